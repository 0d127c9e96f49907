"""Fakes for the cache's tests: rollouts, random shards, a teacher of numpy, a failing storage.

Needs neither torch nor pytest, so that child processes start quickly.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pcodec import ChunkConfig, standalone

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit
from stillroom.cache.errors import StorageError
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.manifest import CHUNK_ROWS, ArrayEntry, Chunk
from stillroom.cache.part import PartMeta
from stillroom.cache.schema import PART_SCHEMA, Arrays
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache, ScoredBy
from stillroom.cache.teacher import RowScores, ScoreRow
from stillroom.cache.zarr_shard import Encoded

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
    """A whole shard of random values: gaps in the scored mask, teacher prompts, NaN and -inf.

    Each of the sequences has at least one of the positions.
    """
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, positions), sequences - 1, replace=False))
    counts = np.diff(np.concatenate([[0], cuts, [positions]]))
    prompts = rng.integers(1, 6, sequences)
    gaps = rng.integers(0, 3, sequences)
    masks = [
        np.concatenate([np.zeros(p, np.uint16), rng.permutation(np.repeat([1, 0], [c, g]))])
        for p, c, g in zip(prompts, counts, gaps, strict=True)
    ]
    own = rng.integers(0, 4, sequences) * rng.integers(0, 2, sequences)
    tail = (-20 * rng.random(positions)).astype(np.float16)
    tail[rng.random(positions) < 0.2] = -np.inf
    behaviour = -rng.random(positions, np.float32)
    behaviour[rng.random(positions) < 0.3] = np.nan
    tokens = sum(len(mask) for mask in masks)
    ids = rng.integers(0, 2**32, (positions, topk), np.uint32)
    return {
        "topk_id": ids,
        "topk_logprob": -np.sort(30 * rng.random((positions, topk))).astype(np.float16),
        "topk_count": np.full(positions, topk, np.uint16),
        "tail_logprob": tail,
        "sampled_logprob": -30 * rng.random(positions, np.float32),
        "behaviour_logprob": behaviour,
        "token": rng.integers(0, VOCAB, tokens, np.uint32),
        "scored": np.concatenate(masks, dtype=np.uint16, casting="unsafe"),
        "sequence_start": _edges([len(mask) for mask in masks]),
        "position_start": _edges(counts),
        "teacher_prompt": rng.integers(0, VOCAB, int(own.sum()), np.uint32),
        "teacher_prompt_start": _edges(own),
        "prompt_length": prompts.astype(np.uint32),
        "prompt_id": rng.integers(0, 2**64, sequences, np.uint64),
        "group": rng.integers(0, 2**64, sequences, np.uint64),
        "sample_index": np.arange(sequences, dtype=np.uint32),
        "rollout_id": rng.integers(0, 2**64, sequences, np.uint64),
        "finish_reason": rng.integers(0, 4, sequences, np.uint16),
        "source": rng.integers(0, 5, sequences, np.uint16),
        "policy_version_min": np.full(sequences, -1, np.int32),
        "policy_version_max": rng.integers(-1, 9, sequences, np.int32),
        "ends_with_stop": rng.integers(0, 2, sequences, np.uint16),
    }


def _edges(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def commit_shard(cache: Cache, arrays: Arrays, number: int = 0) -> Commit:
    """Commit arrays as the shard of a part."""
    commit = cache.add_shard(make_meta(number), "0" * 32, arrays, SCORED_BY)
    assert commit is not None
    return commit


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays are equal to the bit, NaN included."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()


def quick_encode(arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
    """A stand-in for `zarr_shard.encode_shard`, which takes 60 ms: the chunks end to end."""
    data, entries = b"", {}
    for name, array in arrays.items():
        chunks = []
        for start in range(0, len(array), CHUNK_ROWS):
            rows = array[start : start + CHUNK_ROWS]
            padded = np.zeros((CHUNK_ROWS, *array.shape[1:]), array.dtype)
            padded[: len(rows)] = rows
            chunk = bytes(standalone.simple_compress(padded.ravel(), ChunkConfig()))
            chunks.append(Chunk(len(data), len(chunk), jsonfile.digest(chunk)))
            data += chunk
        entries[name] = ArrayEntry(str(array.dtype), array.shape, tuple(chunks))
    return Encoded(data, entries)


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

    def score(
        self, rows: Sequence[ScoreRow], topk: int, temperature: float
    ) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`; the last row comes first."""
        for index in reversed(range(len(rows))):
            token, targets = rows[index].token, rows[index].targets
            self.read.append(token.tolist())
            yield (
                index,
                dense_scores(self.logit_VV[token[targets - 1]] / temperature, token[targets], topk),
            )


def dense_scores(logit_PV: np.ndarray, sampled_P: np.ndarray, topk: int) -> RowScores:
    """Scores of full rows of logits, in float64 until they are rounded."""
    logprob_PV = logit_PV - np.log(np.exp(logit_PV).sum(-1, keepdims=True))
    id_PK = np.argsort(-logprob_PV, axis=-1, kind="stable")[:, :topk]
    half_PK = np.take_along_axis(logprob_PV, id_PK, -1).astype(np.float16)
    order = np.lexsort((id_PK, -half_PK.astype(np.float32)), axis=-1)
    rest_PV = np.exp(logprob_PV)
    np.put_along_axis(rest_PV, id_PK, 0, -1)
    with np.errstate(divide="ignore"):
        tail_P = np.log(rest_PV.sum(-1))
    return RowScores(
        topk_id=np.take_along_axis(id_PK, order, -1).astype(np.uint32),
        topk_logprob=np.take_along_axis(half_PK, order, -1),
        tail_logprob=tail_P.astype(np.float16),
        sampled_logprob=np.take_along_axis(logprob_PV, sampled_P[:, None].astype(int), -1)
        .squeeze(-1)
        .astype(np.float32),
    )


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
