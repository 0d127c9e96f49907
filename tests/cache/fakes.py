"""Fakes for the cache's tests: rollouts, random shards, a teacher of numpy, a failing storage.

Needs neither torch nor pytest, so that child processes start quickly.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.commits import Commit
from stillroom.cache.errors import StorageError
from stillroom.cache.example_shards import random_shard
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.part import PartMeta
from stillroom.cache.schema import PART_SCHEMA, UNUSED_ID, Arrays
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec

VOCAB = 40
TOPK = 5
SCORED_BY = ScoredBy(teacher_s=0.5, scorer={"host": "here", "pid": 1})


def make_identity(**changes: Any) -> Identity:
    """A small identity."""
    teacher = TeacherId(
        name="fake", revision=None, weight_format="F32", compute_dtype="float32", fingerprint="f"
    )
    settings: dict[str, Any] = {
        "teacher": teacher,
        "tokenizer_fingerprint": "t",
        "vocab_size": VOCAB,
        "logit_width": VOCAB,
        "topk": TOPK,
    }
    return Identity(**settings | changes)


def make_meta(number: int = 0, policy: int = 0, **changes: Any) -> PartMeta:
    """What a part of the small identity says of itself; parts are told apart by a number."""
    settings: dict[str, Any] = {
        "policy_version": policy,
        "unit": f"{number:016x}",
        "tokenizer_fingerprint": "t",
        "vocab_size": VOCAB,
        "sampler": {"temperature": 1.0},
    }
    return PartMeta(**settings | changes)


def make_rollout(**changes: Any) -> dict[str, Any]:
    """One row of a part: prompt [1, 2, 3], completion [4, 5]."""
    row = {
        "rollout_id": 7,
        "prompt_id": 8,
        "prompt_name": "p",
        "group": 9,
        "sample_index": 0,
        "prompt": [1, 2, 3],
        "completion": [4, 5],
        "scored": None,
        "behaviour_logprob": None,
        "teacher_prompt": None,
        "finish_reason": "stop",
        "source": "student",
        "policy_version_min": 0,
        "policy_version_max": 0,
        "ends_with_stop": True,
    }
    return row | changes


def make_table(rows: list[dict[str, Any]], **user: pa.DataType) -> pa.Table:
    """Rollouts as a table; `user` gives the types of the columns that begin with `x_`."""
    nullable = [field.with_nullable(True) for field in PART_SCHEMA]
    return pa.Table.from_pylist(rows, pa.schema([*nullable, *user.items()]))


def random_rollouts(seed: int, rows: int) -> pa.Table:
    """Rollouts of random ids and lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (rows, 2)).tolist()
    return make_table(
        [
            make_rollout(
                rollout_id=seed * 1000 + i,
                prompt=rng.integers(0, VOCAB, p).tolist(),
                completion=rng.integers(0, VOCAB, c).tolist(),
                behaviour_logprob=(-rng.random(c)).tolist(),
            )
            for i, (p, c) in enumerate(lengths)
        ]
    )


def random_arrays(seed: int, positions: int, sequences: int, topk: int = TOPK) -> Arrays:
    """A whole shard of random values, each with one of the positions at least."""
    return random_shard(seed, positions, sequences, topk=topk, vocab_size=max(VOCAB, topk))


def commit_shard(cache: Cache, arrays: Arrays, number: int = 0) -> Commit:
    """Commit arrays as the shard of a part."""
    commit = cache.add_shard(make_meta(number), "0" * 32, arrays, SCORED_BY)
    assert commit is not None
    return commit


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit, NaN included."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()


class FakeTeacher:
    """A teacher whose next-token logits are a table: those after token a are row a.

    Args:
        seed: of the table.
        noise: standard deviation, in nats, of what is added to the table's logits.
        numeric_class: what it calls itself.
    """

    def __init__(
        self, seed: int = 0, *, noise: float = 0.0, numeric_class: str = "fake-1-float32-cpu"
    ) -> None:
        """Draw the table."""
        rng = np.random.default_rng(seed)
        self.logit_VV = rng.normal(0, 2, (VOCAB, VOCAB))
        self.logit_VV += rng.normal(0, 1, (VOCAB, VOCAB)) * noise
        self.numeric_class = numeric_class
        self.read: list[list[int]] = []
        """The ids of every row that it was given."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`; the last row comes first."""
        for index in reversed(range(len(rows))):
            row = rows[index]
            self.read.append(row.token.tolist())
            logit_PV = self.logit_VV[row.token[row.targets - 1]] / spec.temperature
            scores = dense_scores(logit_PV, row.token[row.targets], spec.topk, spec.mass)
            yield index, replace(scores, **_dense_extra(logit_PV, scores, row, spec))


def dense_scores(
    logit_PV: np.ndarray, sampled_P: np.ndarray, topk: int, mass: float = 1.0
) -> RowScores:
    """Scores of full rows of logits, position by position, in float64 until they are rounded."""
    positions, vocab = logit_PV.shape
    logprob_PV = log_softmax(logit_PV)
    half_PV = _half(logprob_PV)
    found = RowScores(
        topk_id=np.full((positions, topk), UNUSED_ID, np.uint32),
        topk_logprob=np.full((positions, topk), -np.inf, np.float16),
        topk_count=np.zeros(positions, np.uint16),
        tail_logprob=np.full(positions, -np.inf, np.float16),
        sampled_logprob=logprob_PV[np.arange(positions), sampled_P.astype(int)].astype(np.float32),
    )
    for p, logprob_V in enumerate(logprob_PV):
        likeliest = np.lexsort((np.arange(vocab), -logprob_V)).tolist()
        kept: list[int] = []
        while len(kept) < topk and (mass == 1 or math.fsum(np.exp(logprob_V[kept])) < mass):
            kept.append(likeliest[len(kept)])
        half_V = half_PV[p]
        kept.sort(key=lambda v: (-half_V[v], v))
        found.topk_id[p, : len(kept)] = kept
        found.topk_logprob[p, : len(kept)] = half_V[kept]
        found.topk_count[p] = len(kept)
        rest = np.delete(logprob_V, kept)
        if len(rest):
            found.tail_logprob[p] = _half(np.log(np.exp(rest - rest.max()).sum()) + rest.max())
    return found


def _half(logprob: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(logprob).astype(np.float16)


def log_softmax(logit_PV: np.ndarray) -> np.ndarray:
    """Log probabilities of rows of logits, float64."""
    shifted_PV = logit_PV.astype(np.float64) - logit_PV.max(-1, keepdims=True)
    return np.asarray(shifted_PV - np.log(np.exp(shifted_PV).sum(-1, keepdims=True)))


def _dense_extra(
    logit_PV: np.ndarray, scores: RowScores, row: ScoreRow, spec: ScoreSpec
) -> dict[str, np.ndarray]:
    """The columns of extra ids: the student's as they are, or draws from the tail."""
    if spec.extra_kind == "none":
        return {}
    logprob_PV = log_softmax(logit_PV)
    if spec.extra_kind == "student":
        assert row.extra_id is not None
        unused = row.extra_id == UNUSED_ID
        at = np.take_along_axis(logprob_PV, np.where(unused, 0, row.extra_id).astype(int), 1)
        return {"extra_logprob": np.where(unused, -np.inf, at).astype(np.float16)}
    uniform_PM = np.random.default_rng(row.seed).random((len(logit_PV), spec.extra))
    kept_PV = np.zeros(logit_PV.shape, bool)
    for p, count in enumerate(scores.topk_count):
        kept_PV[p, scores.topk_id[p, :count]] = True
    rest_PV = np.where(kept_PV, 0, np.exp(logprob_PV))
    until_PV = rest_PV.cumsum(1)
    id_PM = (until_PV[:, None] <= (uniform_PM * until_PV[:, -1:])[:, :, None]).sum(2)
    empty_P1 = kept_PV.all(1, keepdims=True)
    at_PM = np.take_along_axis(logprob_PV, np.where(empty_P1, 0, id_PM), 1)
    tail_P1 = scores.tail_logprob[:, None].astype(np.float64)
    given_PM = np.where(empty_P1, np.nan, at_PM - np.where(empty_P1, 0, tail_P1))
    return {
        "extra_id": np.where(empty_P1, UNUSED_ID, id_PM).astype(np.uint32),
        "extra_logprob": np.where(empty_P1, -np.inf, at_PM).astype(np.float16),
        "extra_behaviour_logprob": given_PM.astype(np.float32),
    }


class LostReply(Storage):
    """A storage whose replies to puts below a prefix are lost after the put took effect.

    Args:
        root: as in `Storage`.
        prefix: of the paths whose replies are lost.
        reply: what comes instead: "error", or "exists" as after a retry inside the library.
        effective: whether the put takes effect.
    """

    def __init__(
        self, root: str | os.PathLike[str], prefix: str, reply: str, *, effective: bool = True
    ) -> None:
        """Bind to the root."""
        super().__init__(root)
        self.prefix, self.reply, self.effective = prefix, reply, effective
        self.puts: list[str] = []

    def put_new(self, path: str, data: bytes) -> bool:
        """Put, and lose the reply."""
        self.puts.append(path)
        if not path.startswith(self.prefix):
            return super().put_new(path, data)
        if self.effective:
            super().put_new(path, data)
        if self.reply == "error":
            raise StorageError(self.describe(path), "a reply", "none", "Try again.")
        return False
