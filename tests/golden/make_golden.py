"""How the golden caches of version 1 were made, once: a small cache of each shard format, and what
must be read from it.

NEVER MAKE THEM AGAIN. They stand for the caches that people have: code that does not read them does
not read version 1. The script refuses to write over them; it is kept to say what is in them. Run it
(`python -m tests.golden.make_golden`) only for another format version, under other names.
"""

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.agreement import check_agreement
from stillroom.cache.canary import check_canary
from stillroom.cache.claims import Claim, claim_path
from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.part import PartMeta, prompt_id, rollout_id
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.pins import pin
from stillroom.cache.schema import Arrays
from stillroom.cache.score_rows import score_columns, score_rows
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec
from stillroom.replay.cycle import Cycle, Unit, store_cycle
from stillroom.replay.policies import Policy, put_policy
from stillroom.replay.prompts import Prompt
from stillroom.train.drift import put_drift
from tests.cache.fakes import VOCAB, FakeTeacher, make_table

FOLDER = Path(__file__).parent
EXTRA_KINDS = {"zarr": "student", "parquet": "tail"}
SAMPLER = {"samples_per_prompt": 2, "temperature": 1.0, "top_p": 0.875, "top_k": 0}
SCORED_BY = ScoredBy(
    teacher_s=0.5, scorer={"host": "golden", "pid": 1, "time": "2026-11-21T12:00:00+00:00"}
)
NAN = float("nan")
USER_COLUMNS = {"x_reward": pa.float32(), "x_advantage": pa.list_(pa.float32())}
PARTS: tuple[list[dict[str, Any]], ...] = (
    [
        {
            "prompt": [1, 2, 3],
            "completion": [4, 5, 6, 0],
            "behaviour_logprob": [-0.5, -1.25, -2.0, -0.125],
            "finish_reason": "stop",
            "ends_with_stop": True,
            "extra_id": [[4, 7], [5], None, []],
            "extra_behaviour_logprob": [[-0.5, -3.0], [-1.25], None, []],
            "x_reward": 1.5,
            "x_advantage": [0.25, -0.25, 0.0, 8.0],
        },
        {
            "prompt": [1, 2, 3],
            "completion": [7, 7],
            "sample_index": 1,
            "behaviour_logprob": [-0.75, None],
            "finish_reason": "length",
            "extra_id": [[39, 39], [0, 1]],
            "extra_behaviour_logprob": [None, [NAN, -4.0]],
            "x_advantage": [1.0, NAN],
        },
        {
            "prompt": [8],
            "completion": [9, 10, 11, 12, 13],
            "scored": [1, 1, 0, 0, 1],
            "teacher_prompt": [30, 31, 32, 8],
            "prompt_name": "with a hint",
            "x_reward": -2.0,
        },
        {
            "prompt": [14, 15],
            "completion": [16],
            "finish_reason": "abort",
            "source": "teacher",
            "policy_version_min": -1,
            "policy_version_max": -1,
        },
    ],
    [
        {
            "prompt": [20, 21],
            "completion": [22, 23, 24],
            "scored": [0, 1, 1],
            "teacher_prompt": [33, 20, 21],
            "behaviour_logprob": [NAN, -0.25, -1.5],
            "policy_version_min": 0,
            "extra_id": [[1, 2], [3, 4], [5, 6]],
            "extra_behaviour_logprob": [[-1.0, -2.0], [-0.25, -3.5], None],
            "x_reward": 0.5,
        },
        {"prompt": [25], "completion": [26, 27, 28, 29], "x_advantage": [0.5, 0.5, -1.0, -1.0]},
    ],
    [{"prompt": [34], "completion": [35, 36], "source": "import", "finish_reason": "unknown"}],
)
"""Rollouts of three parts: of policy 0, of policy 1, and one of policy 0 that is retired."""


def make_cache(shard_format: str) -> None:
    """Make one cache, and beside it what it must read as."""
    root, listed = FOLDER / f"v1-{shard_format}", FOLDER / f"v1-{shard_format}.json"
    if root.exists() or listed.exists():
        sys.exit(f"{root} is there, and is for ever.")
    cache = Cache.create(root, make_identity(shard_format))
    teacher = FakeTeacher()
    check_canary(cache, teacher)
    parts = [add_part(cache, number, rows) for number, rows in enumerate(PARTS)]
    arrays = {meta.name: score_part(cache, teacher, meta) for meta in parts}
    again, retired = parts[1].name, parts[2].name
    cache.quarantine(again, "made to be scored again", damaged=True)
    commit(cache, parts[1], arrays[again])
    cache.retire(retired, "made to be collected")
    collect(cache, plan_collection(cache, min_age_s=0))
    snapshot = cache.snapshot()
    pin(cache.storage, "golden", [snapshot.id])
    put_records(cache, parts[0].name)
    expected = {
        "made_with": {name: version(name) for name in ("numpy", "pcodec", "pyarrow", "xxhash")},
        "identity": cache.identity.digest(),
        "snapshot": snapshot.id,
        "retired": retired,
        "commits": {c.part: [c.n, c.digest()] for c in snapshot.commits},
        "rollouts": {
            meta.name: whole_rows(cache, meta, rows)
            for meta, rows in zip(parts[:2], PARTS[:2], strict=True)
        },
        "arrays": {c.part: encoded(arrays[c.part]) for c in snapshot.commits},
    }
    listed.write_text(json.dumps(expected, indent=1) + "\n")


def make_identity(shard_format: str) -> Identity:
    """Identity of the cache of that format."""
    teacher = TeacherId(
        name="golden",
        revision=None,
        weight_format="F32",
        compute_dtype="float32",
        fingerprint="0" * 32,
    )
    return Identity(
        teacher=teacher,
        tokenizer_fingerprint="1" * 32,
        vocab_size=VOCAB,
        logit_width=VOCAB + 2,
        max_length=12,
        topk=4,
        mass=0.75,
        extra=2,
        extra_kind=EXTRA_KINDS[shard_format],
        shard_format=shard_format,
    )


def add_part(cache: Cache, number: int, rows: list[dict[str, Any]]) -> PartMeta:
    """Plan a unit, and store its rollouts."""
    policy = number % 2
    prompts = {id_of(row): row["prompt"] for row in rows}
    unit = Unit(
        policy_version=policy,
        source="student",
        prompt_ids=tuple(prompts),
        sampler=SAMPLER,
        seed=number,
    )
    planned = [
        Prompt(pa.array(ids, pa.uint32()).to_numpy(), key, f"prompt {i}" if i else None)
        for i, (key, ids) in enumerate(prompts.items())
    ]
    store_cycle(cache, f"round-{number}", Cycle((unit,), tuple(planned)))
    meta = PartMeta(
        policy_version=policy,
        unit=unit.id,
        tokenizer_fingerprint=cache.identity.tokenizer_fingerprint,
        vocab_size=cache.identity.vocab_size,
        sampler=SAMPLER,
    )
    table = make_table(whole_rows(cache, meta, rows), **USER_COLUMNS)
    assert cache.add_part(table, meta)
    return meta


def whole_rows(cache: Cache, meta: PartMeta, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rollouts with all columns of a part; without extra ids where the teacher draws them."""
    no_extra = {"extra_id": None, "extra_behaviour_logprob": None}
    defaults = no_extra | {
        "prompt_name": None,
        "sample_index": 0,
        "scored": None,
        "behaviour_logprob": None,
        "teacher_prompt": None,
        "finish_reason": "stop",
        "source": "student",
        "policy_version_min": meta.policy_version,
        "policy_version_max": meta.policy_version,
        "ends_with_stop": False,
        "x_reward": None,
        "x_advantage": None,
    }
    return [
        {"rollout_id": rollout_id(meta.unit, i), "prompt_id": id_of(row), "group": id_of(row)}
        | defaults
        | row
        | ({} if cache.identity.student_extra else no_extra)
        for i, row in enumerate(rows)
    ]


def id_of(row: dict[str, Any]) -> int:
    """Hash of a row's prompt."""
    return prompt_id(pa.array(row["prompt"], pa.uint32()).to_numpy())


def score_part(cache: Cache, teacher: FakeTeacher, meta: PartMeta) -> Arrays:
    """Score a part as the score job does; its arrays before anything is encoded."""
    table, _, _ = cache.read_part(meta.name)
    arrays = part_arrays(table, cache.identity.student_extra)
    rows = score_rows(arrays)
    found = dict(teacher.score(rows, ScoreSpec.of(cache.identity)))
    arrays |= score_columns([found[i] for i in range(len(rows))])
    check_agreement(arrays, meta.name)
    commit(cache, meta, arrays)
    return arrays


def commit(cache: Cache, meta: PartMeta, arrays: Arrays) -> None:
    """Commit a part's shard."""
    _, _, rollouts_hash = cache.read_part(meta.name)
    assert cache.add_shard(meta, rollouts_hash, arrays, SCORED_BY) is not None


def put_records(cache: Cache, part: str) -> None:
    """Small files of the other kinds."""
    policy = Policy(
        version=0, run="golden", parent=None, step=0, path="/golden/student", fingerprint="2" * 32
    )
    put_policy(cache.storage, policy)
    drift = {"0": {"positions": 8, "k3_nats": 0.125, "ess": 0.75, "lag": 1}}
    put_drift(cache.storage, "golden", 10, drift)
    claim = Claim(
        part=part,
        worker="3" * 32,
        host="golden",
        machine="",
        pid=1,
        process_start=0,
        working=False,
    )
    cache.storage.put(claim_path(part), jsonfile.dump_sealed(asdict(claim)))


def encoded(arrays: Arrays) -> dict[str, list[Any]]:
    """Dtype, shape and bytes of arrays."""
    return {
        name: [f"{a.dtype}", list(a.shape), a.astype(a.dtype.newbyteorder("<")).tobytes().hex()]
        for name, a in sorted(arrays.items())
    }


if __name__ == "__main__":
    for shard_format in EXTRA_KINDS:
        make_cache(shard_format)
