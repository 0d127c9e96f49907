"""Caches of made-up rollouts and scores, so that replay is tested without any model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings

from stillroom.cache import jsonfile
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.part import PartMeta, encode_part, prompt_id
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.replay.prompts import Prompt

settings.register_profile("replay", deadline=None)  # a busy machine is no failure
settings.load_profile("replay")

VOCAB_SIZE = 50
TOPK = 3
TEACHER = TeacherId(
    name="made-up",
    revision=None,
    weight_format="F32",
    compute_dtype="float32",
    fingerprint="f" * 32,
)
IDENTITY = Identity(
    teacher=TEACHER,
    tokenizer_fingerprint="t" * 32,
    vocab_size=VOCAB_SIZE,
    logit_width=VOCAB_SIZE,
    topk=TOPK,
)


def unit_name(index: int) -> str:
    """16 hexadecimal digits."""
    return f"{index:016x}"


def make_prompts(count: int, length: int = 3) -> list[Prompt]:
    """Prompts with different tokens."""
    made = []
    for i in range(count):
        token = (np.arange(length) * (i + 1) + i).astype(np.uint32) % VOCAB_SIZE
        made.append(Prompt(token, prompt_id(token), f"p{i}"))
    assert len({prompt.id for prompt in made}) == count
    return made


def part_meta(version: int, unit: int, temperature: float | None = 1.0) -> PartMeta:
    """What is true of a made-up part."""
    return PartMeta(
        policy_version=version,
        unit=unit_name(unit),
        tokenizer_fingerprint=IDENTITY.tokenizer_fingerprint,
        vocab_size=VOCAB_SIZE,
        sampler={"temperature": temperature},
    )


def made_up_table(rng: np.random.Generator, rows: int, version: int) -> pa.Table:
    """Rollouts of 3 to 14 tokens, some with gaps in what is scored or no behaviour logprobs."""
    records = []
    for row in range(rows):
        prompt = rng.integers(0, VOCAB_SIZE, rng.integers(2, 6)).astype(np.uint32)
        completion = rng.integers(0, VOCAB_SIZE, rng.integers(1, 10)).astype(np.uint32)
        scored = rng.integers(0, 2, len(completion)).astype(np.uint8)
        scored[rng.integers(len(completion))] = 1
        records.append(
            {
                "rollout_id": int(rng.integers(2**63)),
                "prompt_id": prompt_id(prompt),
                "prompt_name": None,
                "group": row // 2,
                "sample_index": row % 2,
                "prompt": prompt,
                "completion": completion,
                "scored": scored if row % 3 == 1 else None,
                "behaviour_logprob": None if row % 4 == 3 else -rng.random(len(completion)),
                "teacher_prompt": None,
                "finish_reason": ("stop", "length")[row % 2],
                "source": ("student", "teacher", "import")[row % 3],
                "policy_version_min": version,
                "policy_version_max": version,
                "ends_with_stop": row % 2 == 0,
                "x_weight": float(row),
                "x_advantage": rng.random(len(completion)),
            }
        )
    user = [pa.field("x_weight", pa.float32()), pa.field("x_advantage", pa.list_(pa.float32()))]
    return pa.Table.from_pylist(records, pa.schema([*PART_SCHEMA, *user]))


def add_scored_part(
    cache: Cache, version: int, unit: int, rows: int, *, temperature: float | None = 1.0
) -> str:
    """Add a part and a shard of random scores for it; returns its name."""
    rng = np.random.default_rng([version, unit, rows])
    return score_table(
        cache, made_up_table(rng, rows, version), part_meta(version, unit, temperature), rng
    )


def add_grouped_part(cache: Cache, version: int, unit: int, *, prompts: int, samples: int) -> str:
    """Add a scored part of so many rollouts of each prompt, one after another; returns its name."""
    rng = np.random.default_rng([version, unit, prompts, samples])
    table = made_up_table(rng, prompts * samples, version)
    first = [row - row % samples for row in range(table.num_rows)]
    for name in ("prompt", "prompt_id", "group"):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), table[name].take(pa.array(first)))
    return score_table(cache, table, part_meta(version, unit), rng)


def score_table(
    cache: Cache, table: pa.Table, meta: PartMeta, rng: np.random.Generator | None = None
) -> str:
    """Add rollouts as a part, and a shard of random scores for it; returns its name."""
    rng = rng or np.random.default_rng(0)
    assert cache.add_part(table, meta)
    arrays = part_arrays(table)
    positions, topk = int(arrays["scored"].sum()), cache.identity.topk
    arrays |= {
        "topk_id": rng.integers(0, VOCAB_SIZE, (positions, topk)).astype(np.uint32),
        "topk_logprob": -rng.random((positions, topk)).astype(np.float16),
        "topk_count": np.full(positions, topk, np.uint16),
        "tail_logprob": -rng.random(positions).astype(np.float16),
        "sampled_logprob": -rng.random(positions).astype(np.float32),
    }
    if extra := cache.identity.extra:
        arrays |= {
            "extra_id": rng.integers(0, VOCAB_SIZE, (positions, extra)).astype(np.uint32),
            "extra_logprob": -rng.random((positions, extra)).astype(np.float16),
            "extra_behaviour_logprob": -rng.random((positions, extra)).astype(np.float32),
        }
    rollouts_hash = jsonfile.digest(encode_part(table, meta))
    scored_by = ScoredBy(teacher_s=1.0, scorer={})
    assert cache.add_shard(meta, rollouts_hash, arrays, scored_by) is not None
    return meta.name


@pytest.fixture
def empty_cache(tmp_path: Path) -> Cache:
    """A cache with nothing in it."""
    return Cache.create(tmp_path / "cache", IDENTITY)


@pytest.fixture(scope="session")
def scored_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three scored parts of 11, 17 and 9 rows, sampled at temperatures 1, 0.5 and 1."""
    cache = Cache.create(tmp_path_factory.mktemp("scored") / "cache", IDENTITY)
    add_scored_part(cache, 0, 0, 11)
    add_scored_part(cache, 0, 1, 17, temperature=0.5)
    add_scored_part(cache, 1, 2, 9)
    return cache


@pytest.fixture(scope="session")
def other_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same teacher's scores of other rollouts."""
    cache = Cache.create(tmp_path_factory.mktemp("other") / "cache", replace(IDENTITY))
    add_scored_part(cache, 0, 7, 37)
    return cache
