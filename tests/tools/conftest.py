"""One small cache with made-up scores and every kind of part; and a way to run the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from stillroom.cache import jsonfile
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.part import PartMeta, part_name, prompt_id, rollout_id
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import PART_SCHEMA, Arrays
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
from stillroom.replay.policies import register_initial
from stillroom.tools.cli import main

TOPK = 8
TEXTS = [
    "abc \x1b[31mred\u202e caf\u00e9\n[bold]x[/bold]",
    "ab",
    "count: abcabc",
    "a longer one, of text",
]
LIVE, RETIRED, QUARANTINED, UNSCORED = (part_name(0, f"{i:016x}") for i in range(1, 5))


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Its output as JSON, in which NaN and infinities are no numbers."""

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        return json.loads(self.out, parse_constant=refuse)


Run = Callable[..., Ran]
Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run_main(*args: object) -> Ran:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Ran(status, out, err)

    return run_main


@pytest.fixture
def quiet_jobs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Jobs use one thread, and leave nothing in the user's own cache of datasets."""
    import datasets
    import torch

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tree() -> Tree:
    """Every file below a folder with its bytes, and every folder."""

    def read(root: Path) -> dict[str, bytes]:
        paths = sorted(root.rglob("*")) if root.is_dir() else []
        return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in paths}

    return read


@pytest.fixture(scope="session")
def made_root(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path
) -> Path:
    """A root with a scored, a retired, a quarantined and an unscored part, and a lost attempt."""
    root = tmp_path_factory.mktemp("made") / "cache"
    config = TeacherConfig(model=str(teacher_dir))
    cache = Cache.create(
        root, identity_of(inspect_model(config.model), config, ScoreSpec(topk=TOPK))
    )
    register_initial(cache.storage, inspect_model(str(student_dir)), "made-up")
    for part in (LIVE, RETIRED, QUARANTINED):
        _add_part(cache, part, student_dir, scored=True)
    cache.snapshot([LIVE, RETIRED])
    _add_part(cache, UNSCORED, student_dir, scored=False)
    cache.retire(RETIRED, "too old")
    cache.quarantine(QUARANTINED, "scored again by request", damaged=False)
    cache.storage.put_new(f"scores/{UNSCORED}/{'e' * 32}/shard.zarr.zip", b"half a shard")
    return root


@pytest.fixture
def damaged(made_root: Path, tmp_path: Path) -> Path:
    """A copy of that root, to be damaged."""
    return shutil.copytree(made_root, tmp_path / "cache")


@pytest.fixture(scope="session")
def live_part() -> str:
    """Name of the scored part."""
    return LIVE


def _add_part(cache: Cache, part: str, tokenizer_dir: Path, *, scored: bool) -> None:
    unit = part[-16:]
    meta = PartMeta(
        policy_version=0,
        unit=unit,
        tokenizer_fingerprint=cache.identity.tokenizer_fingerprint,
        vocab_size=cache.identity.vocab_size,
        sampler={"temperature": 1.0, "top_p": 1.0},
    )
    table = pa.Table.from_pylist(_records(unit, tokenizer_dir), PART_SCHEMA)
    assert cache.add_part(table, meta)
    if scored:
        arrays = part_arrays(table)
        arrays |= _scores(arrays, cache.identity.vocab_size)
        rollouts_hash = jsonfile.digest(cache.storage.get(f"rollouts/{part}.parquet"))
        scorer = {"host": "made-up", "time": "2026-01-01T00:00:00+00:00"}
        assert cache.add_shard(meta, rollouts_hash, arrays, ScoredBy(teacher_s=2.0, scorer=scorer))


def _records(unit: str, tokenizer_dir: Path) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    prompt = np.array(tokenizer.encode("<|user|>hi<|end|><|assistant|>").ids, np.uint32)
    records = []
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text).ids
        records.append(
            {
                "rollout_id": rollout_id(unit, i),
                "prompt_id": prompt_id(prompt),
                "prompt_name": None,
                "group": rollout_id(unit, 100 + i),
                "sample_index": 0,
                "prompt": prompt,
                "completion": ids,
                "scored": [0, *[1] * (len(ids) - 1)] if i == 2 else None,
                "behaviour_logprob": None if i == 3 else [-0.5] * len(ids),
                "teacher_prompt": [*prompt, *prompt] if i == 1 else None,
                "finish_reason": "stop" if i % 2 else "length",
                "source": "student",
                "policy_version_min": 0,
                "policy_version_max": 0,
                "ends_with_stop": False,
            }
        )
    return records


def _scores(arrays: Arrays, vocab_size: int) -> Arrays:
    """Full distributions cut to K; of the sampled tokens the first is the least likely there is,
    and the second the likeliest."""
    sampled = arrays["token"][arrays["scored"] == 1].astype(np.int64)
    at = np.arange(len(sampled))
    logit = np.random.default_rng(0).normal(0, 3, (len(sampled), vocab_size))
    logit[0, sampled[0]], logit[1, sampled[1]] = -30, 30
    logprob = logit - np.log(np.exp(logit).sum(1, keepdims=True))
    half = np.minimum(logprob, 0).astype(np.float16)
    order = np.lexsort((np.broadcast_to(np.arange(vocab_size), half.shape), -half.astype(float)))
    ids, rest = order[:, :TOPK], order[:, TOPK:]
    tail = np.log(np.exp(np.take_along_axis(logprob, rest, 1)).sum(1))
    return {
        "topk_id": ids.astype(np.uint32),
        "topk_logprob": np.take_along_axis(half, ids, 1),
        "topk_count": np.full(len(at), TOPK, np.uint16),
        "tail_logprob": np.minimum(tail, 0).astype(np.float16),
        "sampled_logprob": np.minimum(logprob[at, sampled], 0).astype(np.float32),
    }
