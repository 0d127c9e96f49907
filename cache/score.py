"""The score job: the teacher reads every unscored part and its scores become the part's shard.

Scorers know nothing of one another but their claims, which save work. Two that score the same part
all the same both write an attempt; one commit wins and the other scorer goes on. Nothing is ever
deleted here.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from stillroom.cache.agreement import check_agreement
from stillroom.cache.canary import CanaryCheck
from stillroom.cache.check_rows import check_rows
from stillroom.cache.claims import Claims
from stillroom.cache.errors import (
    CorruptError,
    InputError,
    MismatchError,
    NumericsError,
    StillroomError,
)
from stillroom.cache.outlook import Outlook
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.progress import Progress
from stillroom.cache.row_lengths import RowLengths
from stillroom.cache.schema import Arrays
from stillroom.cache.score_rows import score_columns, score_rows
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.shared_work import SharedWork
from stillroom.cache.store import Cache
from stillroom.cache.teacher import (
    RowScores,
    ScoreRow,
    ScoreSpec,
    Teacher,
    longest_row_of,
    stats_of,
)
from stillroom.cache.workers import ALONE, Worker

PART_ERRORS = (CorruptError, InputError, NumericsError)
"""Errors of one part, which say nothing about others."""


@dataclass(slots=True)
class ScoreReport:
    """What a run of the job did."""

    scored: list[str] = field(default_factory=list)
    """Parts committed by this run."""
    lost: list[str] = field(default_factory=list)
    """Parts that another scorer committed first."""
    too_long: list[str] = field(default_factory=list)
    """Parts that were left out: a row of theirs is longer than the teacher reads."""
    positions: int = 0
    """Scored tokens committed."""
    teacher_s: float = 0.0
    """Seconds that the teacher took for them."""
    work_s: float = 0.0
    """Seconds of this process for the parts that it worked on, with reading and storing."""
    model_s: float = 0.0
    """Seconds of those in which the teacher's model ran; 0 where the teacher does not tell."""


class Scorer:
    """A loaded teacher and the cache that it fills: it scores what it is given, part by part.

    The canary is scored before the first part, and again once an hour.

    Args:
        cache: where the parts lie.
        teacher: an engine that runs the identity's teacher.
        accept_numerics: allow a numeric class that the cache has not seen.
        check_teacher: let it score the canary; one that stays in memory need not each time.
        worker: whose share of the parts comes first.
        too_long: what becomes of parts with a row that is longer than the teacher reads, where it
            tells: refuse (before the first part is scored) or skip.
    """

    def __init__(
        self,
        cache: Cache,
        teacher: Teacher,
        *,
        accept_numerics: bool = False,
        check_teacher: bool = True,
        worker: Worker = ALONE,
        too_long: str = "refuse",
    ) -> None:
        """Nothing is asked of the storage or the teacher yet."""
        self.cache = cache
        self.report = ScoreReport()
        self.failed: dict[str, StillroomError] = {}
        """Parts that cannot be scored, and why: they are left out from then on."""
        self.claims = Claims(cache.storage)
        self._teacher = teacher
        self._check = CanaryCheck(cache, teacher, accept_numerics) if check_teacher else None
        self._outlook = Outlook(teacher)
        self._lengths = RowLengths(cache, longest_row_of(teacher), too_long)
        self._probed = False
        self._work = SharedWork(
            job="score",
            claims=self.claims,
            is_left=self._is_left,
            do=self._score,
            worker=worker,
        )

    def prepare(self) -> None:
        """Check the storage, and the teacher where that is due.

        Raises:
            MismatchError: the teacher does not compute what the cache holds.
        """
        if not self._probed:
            self.cache.storage.check_conditional_puts()
            self._probed = True
        if self._check is not None:
            self._check.if_due()

    def fitting(self, parts: Sequence[str]) -> list[str]:
        """Those of some parts that the teacher can read whole; the others are in the report.

        Raises:
            InputError: there are others, and they are not to be skipped.
        """
        fit = self._lengths.fitting(parts)
        self.report.too_long = sorted(self._lengths.too_long)
        return fit

    def score(self, parts: Sequence[str]) -> None:
        """Score parts. Those that others have claimed are left to them until nothing else is left
        to do; then this one waits, and takes over what they do not finish.

        Raises:
            MismatchError: the teacher does not compute what the cache holds, or answers for other
                tokens.
            NumericsError: it gave NaN or infinite logits; names the part and the row. Nothing of
                the part is committed, and all others were scored first.
            InputError, CorruptError: a part cannot be scored or read; all others were scored first.
                Or rows are too long, and nothing was scored.
        """
        parts = self.fitting(parts)
        if parts:
            self.prepare()
            self._outlook.expect(parts)
            self._work.do_all(parts)
            raise_first({p: self.failed[p] for p in parts if p in self.failed})

    def score_free(self, parts: Sequence[str]) -> list[str]:
        """Score the parts that nobody else has claimed; returns those that somebody has. Parts that
        cannot be scored are added to `failed`.

        Raises:
            MismatchError: the teacher does not compute what the cache holds.
        """
        if self._lengths.skips:
            parts = self.fitting(parts)
        if not parts:
            return []
        self.prepare()
        self._outlook.expect(parts)
        return self._work.do_free(parts)

    def _score(self, part: str, progress: Callable[[], None]) -> None:
        if self._check is not None:
            self._check.if_due()
        start, model_s = time.perf_counter(), self._model_s()
        try:
            _score_part(self.cache, self._teacher, part, self.report, progress, self._outlook)
        except PART_ERRORS as error:
            # a new one, as frames hang on this one, and with them a batch of the teacher
            self.failed[part] = type(error)(error.where, error.expected, error.got, error.do)
            print(f"  score: {part} is left out: {error}", file=sys.stderr, flush=True)
        self.report.work_s += time.perf_counter() - start
        self.report.model_s += self._model_s() - model_s
        self._outlook.drop(part)

    def _is_left(self, part: str) -> bool:
        is_left = part not in self.failed and self.cache.is_unscored(part)
        if not is_left:
            self._outlook.drop(part)
        return is_left

    def _model_s(self) -> float:
        return stats_of(self._teacher).get("model_s", 0.0)


def score(
    cache: Cache,
    teacher: Teacher,
    *,
    accept_numerics: bool = False,
    check_teacher: bool = True,
    worker: Worker = ALONE,
    too_long: str = "refuse",
) -> ScoreReport:
    """Score every part that has no shard: in the end every part is scored, by this scorer or
    another. See `Scorer` for the arguments.

    Raises:
        StillroomError: as `Scorer.score`.
    """
    scorer = Scorer(
        cache,
        teacher,
        accept_numerics=accept_numerics,
        check_teacher=check_teacher,
        worker=worker,
        too_long=too_long,
    )
    scorer.score(cache.unscored())
    return scorer.report


def raise_first(failed: dict[str, StillroomError]) -> None:
    """Raise why the first of some parts could not be scored, and how many there are.

    Args:
        failed: part to error; may be empty.

    Raises:
        StillroomError: the first error.
    """
    for error in failed.values():
        if len(failed) == 1:
            raise error
        do = f"{error.do} In all {len(failed)} parts cannot be scored."
        raise type(error)(error.where, error.expected, error.got, do) from error


def _score_part(
    cache: Cache,
    teacher: Teacher,
    part: str,
    report: ScoreReport,
    progress: Callable[[], None],
    outlook: Outlook,
) -> None:
    table, meta, rollouts_hash = cache.read_part(part)
    identity = cache.identity
    check_rows(table, meta.vocab_size, part, identity.max_length, identity.student_extra)
    arrays = part_arrays(table, identity.student_extra)
    start = time.perf_counter()
    scores = _run_teacher(cache, teacher, part, score_rows(arrays), progress, outlook)
    teacher_s = time.perf_counter() - start
    arrays |= score_columns(scores)
    _check_scores(arrays, part)
    commit = cache.add_shard(
        meta, rollouts_hash, arrays, ScoredBy(teacher_s=teacher_s, scorer=_scorer(teacher))
    )
    if commit is None:
        report.lost.append(part)
        return
    report.scored.append(part)
    report.positions += commit.positions
    report.teacher_s += teacher_s


def _check_scores(arrays: Arrays, part: str) -> None:
    """Scores that are not of their tokens are the engine's fault, and no part's."""
    try:
        check_agreement(arrays, part)
    except CorruptError as error:
        raise MismatchError(error.where, error.expected, error.got, error.do) from error


def _run_teacher(
    cache: Cache,
    teacher: Teacher,
    part: str,
    rows: list[ScoreRow],
    progress: Callable[[], None],
    outlook: Outlook,
) -> list[RowScores]:
    found: dict[int, RowScores] = {}
    positions = sum(len(row.targets) for row in rows)
    outlook.begin(positions)
    try:
        with Progress(f"score {part}", positions, "positions", outlook.text) as shown:
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
