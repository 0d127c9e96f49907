"""The score job: the teacher reads every unscored part and its scores become the part's shard.

Scorers know nothing of one another but their claims, which save work. Two that score the same part
all the same both write an attempt; one commit wins and the other scorer goes on. Nothing is ever
deleted here.
"""

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from stillroom.cache.agreement import check_agreement
from stillroom.cache.canary import check_canary
from stillroom.cache.check_rows import check_rows
from stillroom.cache.claims import Claims
from stillroom.cache.errors import InputError, NumericsError
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.progress import Progress
from stillroom.cache.score_rows import score_columns, score_rows
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher

LOOK_AFTER_S = (2.0, 30.0)
"""A scorer that waits for others looks again after the first, and then less and less often, down to
the second."""
FULL_LOOK_EVERY = 4
"""Looks of which one asks for more than claims: whether the parts are still to be scored at all."""


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


def score(
    cache: Cache, teacher: Teacher, *, accept_numerics: bool = False, check_teacher: bool = True
) -> ScoreReport:
    """Score every part that has no shard.

    Parts that other scorers have claimed are left to them until nothing else is left to do. Then
    this one waits, and takes over what they do not finish: in the end every part is scored.

    Args:
        cache: where the parts lie.
        teacher: an engine that runs the identity's teacher.
        accept_numerics: allow a numeric class that the cache has not seen.
        check_teacher: let it score the canary first; one that stays in memory need not each time.

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
    if check_teacher:
        check_canary(cache, teacher, accept_numerics=accept_numerics)
    claims = Claims(cache.storage)
    parts = _score_free(cache, teacher, claims, parts, report)
    if parts:
        _say_waiting(parts)
    waits, looks = _waits(), 0
    while parts:
        time.sleep(next(waits))
        looks += 1
        if looks % FULL_LOOK_EVERY == 0:
            parts = [part for part in parts if cache.is_unscored(part)]
        held = {part for part in parts if claims.is_held(part)}
        free = [part for part in parts if part not in held]
        if free:
            left = _score_free(cache, teacher, claims, free, report)
            waits = _waits() if len(left) < len(free) else waits
            held.update(left)
        parts = sorted(held)
    return report


def _waits() -> Iterator[float]:
    """Seconds before each look: up to twice those before the last; drawn, so that scorers that
    began to wait together do not all look at once."""
    wait, longest = LOOK_AFTER_S
    while True:
        yield wait * random.uniform(0.75, 1.0)
        wait = min(2 * wait, longest)


def _score_free(
    cache: Cache, teacher: Teacher, claims: Claims, parts: list[str], report: ScoreReport
) -> list[str]:
    """Score the parts that nobody else has claimed; returns those that somebody has."""
    held = []
    for part in claims.in_own_order(parts):
        if not cache.is_unscored(part):
            continue
        if not claims.take(part):
            held.append(part)
            continue
        with claims.renewed(part) as progress:
            if cache.is_unscored(part):  # its last owner may have committed it and let go since
                _score_part(cache, teacher, part, report, progress)
    return held


def _say_waiting(parts: list[str]) -> None:
    what = f"parts that other scorers have claimed: {len(parts)}, such as {parts[0]}"
    print(f"  score: waiting for {what}", file=sys.stderr, flush=True)


def _score_part(
    cache: Cache, teacher: Teacher, part: str, report: ScoreReport, progress: Callable[[], None]
) -> None:
    table, meta, rollouts_hash = cache.read_part(part)
    identity = cache.identity
    check_rows(table, meta.vocab_size, part, identity.max_length, identity.student_extra)
    arrays = part_arrays(table, identity.student_extra)
    start = time.perf_counter()
    scores = _run_teacher(cache, teacher, part, score_rows(arrays), progress)
    teacher_s = time.perf_counter() - start
    arrays |= score_columns(scores)
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


def _run_teacher(
    cache: Cache,
    teacher: Teacher,
    part: str,
    rows: list[ScoreRow],
    progress: Callable[[], None],
) -> list[RowScores]:
    found: dict[int, RowScores] = {}
    positions = sum(len(row.targets) for row in rows)
    try:
        with Progress(f"score {part}", positions, "positions") as shown:
            for index, scores in teacher.score(rows, ScoreSpec.of(cache.identity)):
                found[index] = scores
                progress()
                shown.advance(len(scores.sampled_logprob))
    except (NumericsError, InputError) as error:
        raise type(error)(f"{part}, {error.where}", error.expected, error.got, error.do) from error
    return [found[i] for i in range(len(rows))]


def _scorer(teacher: Teacher) -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "numeric_class": teacher.numeric_class,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
