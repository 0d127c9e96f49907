"""The score job: the teacher reads every unscored part and its scores become the part's shard.

Scorers know nothing of one another. Two that score the same part both write an attempt; one commit
wins and the other scorer goes on. Nothing is ever deleted here.
"""

import os
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from stillroom.cache.canary import check_canary
from stillroom.cache.errors import CorruptError, InputError, NumericsError
from stillroom.cache.part import check_rows, part_arrays
from stillroom.cache.progress import Progress
from stillroom.cache.schema import Arrays
from stillroom.cache.store import Cache, ScoredBy
from stillroom.cache.teacher import RowScores, ScoreRow, Teacher

HALF_ULP = 2**-11
MASS_SLACK = 0.01


@dataclass(slots=True)
class ScoreReport:
    """What a run of the job did."""

    scored: list[str] = field(default_factory=list)
    """Parts committed by this run."""
    lost: list[str] = field(default_factory=list)
    """Parts that another scorer committed first."""
    positions: int = 0
    """Scored tokens committed."""
    teacher_s: float = 0.0
    """Seconds that the teacher took for them."""


def score(cache: Cache, teacher: Teacher, *, accept_numerics: bool = False) -> ScoreReport:
    """Score every part that has no shard.

    Args:
        cache: where the parts lie.
        teacher: an engine that runs the identity's teacher.
        accept_numerics: allow a numeric class that the cache has not seen.

    Raises:
        MismatchError: the teacher does not compute what the cache holds.
        NumericsError: it gave NaN or infinite logits; names the part and the row. Nothing of the
            part is committed.
    """
    report = ScoreReport()
    parts = cache.unscored()
    if not parts:
        return report
    cache.storage.check_conditional_puts()
    check_canary(cache, teacher, accept_numerics=accept_numerics)
    for part in parts:
        if not cache.is_scored(part):
            _score_part(cache, teacher, part, report)
    return report


def _score_part(cache: Cache, teacher: Teacher, part: str, report: ScoreReport) -> None:
    table, meta, rollouts_hash = cache.read_part(part)
    check_rows(table, meta.vocab_size, part, cache.identity.max_length)
    arrays = part_arrays(table)
    start = time.perf_counter()
    scores = _run_teacher(cache, teacher, part, score_rows(arrays))
    teacher_s = time.perf_counter() - start
    arrays |= _joined(scores)
    check_agreement(arrays, part)
    commit = cache.add_shard(
        meta, rollouts_hash, arrays, ScoredBy(teacher_s=teacher_s, scorer=_scorer(teacher))
    )
    if commit is None:
        report.lost.append(part)
        return
    report.scored.append(part)
    report.positions += commit.positions
    report.teacher_s += teacher_s


def score_rows(arrays: Arrays) -> list[ScoreRow]:
    """What the teacher reads for each sequence: its own prompt where it has one, then the
    completion."""
    rows = []
    starts, own_starts = (
        arrays["sequence_start"].astype(int),
        arrays["teacher_prompt_start"].astype(int),
    )
    for i, prompt_length in enumerate(arrays["prompt_length"].astype(int)):
        token = arrays["token"][starts[i] : starts[i + 1]]
        targets = np.flatnonzero(arrays["scored"][starts[i] : starts[i + 1]])
        own = arrays["teacher_prompt"][own_starts[i] : own_starts[i + 1]]
        if len(own):
            token = np.concatenate([own, token[prompt_length:]])
            targets = targets - prompt_length + len(own)
        rows.append(ScoreRow(token, targets))
    return rows


def check_agreement(arrays: Arrays, part: str) -> None:
    """A sampled token has the same logprob in the top k, or else none above theirs; each row has
    mass 1.

    Raises:
        CorruptError: scores do not belong to their tokens; names the position.
    """
    scored = arrays["scored"].astype(bool)
    sampled = arrays["token"][scored]
    top = arrays["topk_logprob"].astype(np.float32)
    hit = arrays["topk_id"] == sampled[:, None]
    listed = np.where(hit, top, 0).sum(1, dtype=np.float32)
    slack = HALF_ULP * np.maximum(1, -arrays["sampled_logprob"]) + 1e-4
    agrees = np.abs(listed - arrays["sampled_logprob"]) <= slack
    below = arrays["sampled_logprob"] <= top[:, -1] + slack
    mass = np.exp(top).sum(1) + np.exp(arrays["tail_logprob"].astype(np.float32))
    # "not (good)", because NaN compares false
    wrong = ~(np.where(hit.any(1), agrees, below) & (np.abs(mass - 1) <= MASS_SLACK))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise CorruptError(
            f"{part}, position {at}",
            f"logprob {arrays['sampled_logprob'][at]:.4f} for it in the top k too, and a mass of 1",
            f"{listed[at]:.4f} and {mass[at]:.4f}",
            "The teacher answered for other tokens: report this engine.",
        )


def _run_teacher(
    cache: Cache, teacher: Teacher, part: str, rows: list[ScoreRow]
) -> list[RowScores]:
    found: dict[int, RowScores] = {}
    positions = sum(len(row.targets) for row in rows)
    try:
        with Progress(f"score {part}", positions, "positions") as progress:
            for index, scores in teacher.score(
                rows, cache.identity.topk, cache.identity.temperature
            ):
                found[index] = scores
                progress.advance(len(scores.sampled_logprob))
    except (NumericsError, InputError) as error:
        raise type(error)(f"{part}, {error.where}", error.expected, error.got, error.do) from error
    return [found[i] for i in range(len(rows))]


def _joined(scores: list[RowScores]) -> Arrays:
    topk_id = np.concatenate([s.topk_id for s in scores])
    return {
        "topk_id": topk_id,
        "topk_logprob": np.concatenate([s.topk_logprob for s in scores]),
        "topk_count": np.full(len(topk_id), topk_id.shape[1], np.uint16),
        "tail_logprob": np.concatenate([s.tail_logprob for s in scores]),
        "sampled_logprob": np.concatenate([s.sampled_logprob for s in scores]),
    }


def _scorer(teacher: Teacher) -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "numeric_class": teacher.numeric_class,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
