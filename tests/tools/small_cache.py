"""A small cache that holds an object of every kind, made without torch; and ways to damage it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.part import part_name, prompt_id
from stillroom.cache.pins import pin
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.tombstones import put_tombstone
from stillroom.replay.cycle import plan_cycle, store_cycle
from stillroom.replay.policies import Policy, put_policy
from stillroom.replay.prompts import Prompt
from stillroom.replay.sampler import SamplerConfig
from stillroom.train.drift import put_drift
from tests.cache.fakes import VOCAB, FakeTeacher, make_identity, make_meta, make_rollout, make_table

LIVE, OTHER, RETIRED, AGAIN, DAMAGED, GONE, UNSCORED = (part_name(0, f"{i:016x}") for i in range(7))
FORMATS = ("zarr", "parquet")

Change = Callable[[dict[str, Any]], object]


def make_cache(root: Path, shard_format: str, *, parts: int = 2) -> Cache:
    """Scored parts with a mass cut-off, draws from the tail and user columns, and a snapshot."""
    identity = make_identity(
        shard_format=shard_format, mass=0.3, extra=2, extra_kind="tail", max_length=64
    )
    cache = Cache.create(root, identity)
    for number in range(parts):
        cache.add_part(rollouts(number), make_meta(number))
    score(cache, FakeTeacher())
    assert (cache.read(LIVE)["topk_count"] < identity.topk).any(), "the cut-off leaves entries out"
    cache.snapshot()
    return cache


def fill(cache: Cache) -> None:
    """Add an object of every other kind, and parts in every state, to a cache of two parts."""
    for number in (2, 3, 4, 5):
        cache.add_part(rollouts(number), make_meta(number))
    score(cache, FakeTeacher())
    cache.snapshot([LIVE, RETIRED])
    cache.quarantine(AGAIN, "another tokenizer", damaged=False)
    cache.quarantine(DAMAGED, "a bad sector", damaged=True)
    score(cache, FakeTeacher())
    for part in (RETIRED, GONE):
        cache.retire(part, "too old")
    put_tombstone(cache.storage, GONE, 0, "d" * 32)
    for entry in [*cache.storage.list(f"scores/{GONE}"), *cache.storage.list("rollouts")]:
        if GONE in entry.path:
            cache.storage.delete(entry.path)
    cache.add_part(rollouts(6), make_meta(6))
    cache.storage.put_new(f"scores/{UNSCORED}/{'e' * 32}/manifest.json", lost_manifest())
    token = np.arange(3, dtype=np.uint32)
    plan = plan_cycle(
        [Prompt(token, prompt_id(token), "p")],
        SamplerConfig(),
        policy_version=0,
        seed=1,
        unit_rollouts=4,
    )
    store_cycle(cache, "v000000", plan)
    student = Policy(
        version=0, run="r", parent=None, step=0, path="/nowhere/student", fingerprint="f" * 32
    )
    put_policy(cache.storage, student)
    put_drift(cache.storage, "run", 7, {"0": {"ess": 1.0}})
    pin(cache.storage, "run", [cache.snapshot([LIVE]).id])


def lost_manifest() -> bytes:
    """What an attempt that never got its shard says of itself."""
    return jsonfile.dump({"part": UNSCORED, "attempt": "e" * 32})


def rollouts(number: int, rows: int = 4) -> pa.Table:
    """Rollouts of a part, with user columns, masks and prompts that only the teacher saw."""
    rng = np.random.default_rng(number)
    records = []
    for i, length in enumerate(rng.integers(2, 9, rows).tolist()):
        record = make_rollout(
            rollout_id=number * 1000 + i,
            prompt=rng.integers(0, VOCAB, 3).tolist(),
            completion=rng.integers(0, VOCAB, length).tolist(),
            behaviour_logprob=(-rng.random(length)).tolist(),
            scored=[0, *[1] * (length - 1)] if i == 1 else None,
            teacher_prompt=[1, 2] if i == 2 else None,
        )
        records.append(record | {"x_reward": float(i), "x_weight": rng.random(length).tolist()})
    return make_table(records, x_reward=pa.float32(), x_weight=pa.list_(pa.float32()))


def attempt(root: Path, part: str) -> Path:
    """Folder of a part's committed attempt."""
    return root / "scores" / part / Cache.open(root).commit_of(part).attempt


def shard_object(root: Path, part: str) -> Path:
    """A part's shard."""
    [path] = attempt(root, part).glob("shard.*")
    return path


def edit(path: Path, change: Change) -> None:
    """Change a sealed JSON file, and seal it again: damage by a program."""
    value = jsonfile.load_sealed(path.read_bytes(), str(path))
    change(value)
    path.write_bytes(jsonfile.dump_sealed(value))


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file: damage by a disk."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ (1 << bit)]))
