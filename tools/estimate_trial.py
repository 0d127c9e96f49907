"""What a short trial of the teacher tells: how long it takes for a token, and how many bytes its
scores take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pyarrow as pa

from stillroom.cache.identity import Identity
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.score_rows import score_columns, score_rows
from stillroom.cache.shard_format import shard_format
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher

TRIALS = 3
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A teacher's trial on some rollouts."""

    rows: int
    positions: int
    tokens: int
    seconds_per_token: tuple[float, ...]
    """Of each of the trials, which are of different rows; ascending."""
    bytes_per_position: float
    """Of their scores, encoded as a shard; a whole part's take a little less."""

    @property
    def middle_s(self) -> float:
        """Seconds a token, the median."""
        return median(self.seconds_per_token)


def try_teacher(
    teacher: Teacher, tables: Sequence[pa.Table], identity: Identity, rows: int
) -> Trial:
    """Let a teacher score some rollouts, a third of them at a time. Before, it reads the longest of
    them all, so that a context that is too short is found here.

    Args:
        teacher: the teacher.
        tables: rollouts, one at least.
        identity: of the cache.
        rows: how many of the rollouts to take, at most; drawn evenly, with a fixed seed.

    Raises:
        StillroomError: as the teacher's.
    """
    whole, spec = pa.concat_tables(tables, promote_options="default"), ScoreSpec.of(identity)
    every = score_rows(part_arrays(whole, identity.student_extra))
    _timed(teacher, [max(every, key=lambda row: len(row.token))], spec)
    arrays = part_arrays(_drawn(whole, rows), identity.student_extra)
    asked = score_rows(arrays)
    scores: list[RowScores] = []
    seconds = []
    for group in np.array_split(np.arange(len(asked)), min(TRIALS, len(asked))):
        chosen = [asked[i] for i in group]
        found, elapsed = _timed(teacher, chosen, spec)
        scores += found
        seconds.append(elapsed / sum(len(row.token) for row in chosen))
    arrays |= score_columns(scores)
    encoded = shard_format(identity.shard_format).encode(arrays, {})
    positions = len(arrays["sampled_logprob"])
    return Trial(
        rows=len(asked),
        positions=positions,
        tokens=sum(len(row.token) for row in asked),
        seconds_per_token=tuple(sorted(seconds)),
        bytes_per_position=len(encoded.data) / positions,
    )


def _drawn(table: pa.Table, rows: int) -> pa.Table:
    if len(table) <= rows:
        return table
    chosen = np.random.default_rng(SEED).choice(len(table), rows, replace=False)
    return table.take(np.sort(chosen))


def _timed(
    teacher: Teacher, rows: list[ScoreRow], spec: ScoreSpec
) -> tuple[list[RowScores], float]:
    start = time.perf_counter()
    found = dict(teacher.score(rows, spec))
    elapsed = time.perf_counter() - start
    return [found[i] for i in range(len(rows))], elapsed
