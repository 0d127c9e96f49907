"""The mixture of several teachers of which only the likeliest tokens are known: entries are lower
bounds, and what no list tells stays in the tail.

`docs/several-teachers.md` has the bounds and their proofs. Where members give full vocabularies,
`full_logits` mixes them exactly.

Shapes: p positions, C candidates.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np

from stillroom.cache.entries import keep_likeliest
from stillroom.cache.errors import ConfigError, InputError, NumericsError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import (
    RowScores,
    ScoreRow,
    ScoreSpec,
    Teacher,
    longest_row_of,
    stats_of,
)


class MixedTeacher:
    """Several teachers of one vocabulary as one.

    Args:
        members: the teachers.
        shares: of the probability, one a member; they sum to 1.
        vocab_size: ids of the vocabulary.
        topk: entries that are asked of each member; None is twice those that are kept.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        shares: Sequence[float],
        vocab_size: int,
        topk: int | None = None,
    ) -> None:
        """Bind them."""
        self._members, self._shares = members, shares
        self._vocab_size, self._topk = vocab_size, topk

    @property
    def numeric_class(self) -> str:
        """How many are mixed, from how many entries each, and the classes of all."""
        classes = "+".join(dict.fromkeys(member.numeric_class for member in self._members))
        asked = "twice" if self._topk is None else f"top{self._topk}"
        return f"ensemble-{len(self._members)}-{asked}-{classes}"

    @property
    def longest_row(self) -> int | None:
        """The least of the members' that tell; None where none does."""
        told = [longest for longest in map(longest_row_of, self._members) if longest is not None]
        return min(told, default=None)

    def stats(self) -> dict[str, float]:
        """Sums of what the members tell; see `teacher.stats_of`."""
        total: dict[str, float] = {}
        for told in map(stats_of, self._members):
            total |= {name: total.get(name, 0.0) + value for name, value in told.items()}
        return total

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows; see `teacher.Teacher`. All members work on them at the same time, and a row
        is yielded when all have scored it.

        Raises:
            ConfigError: extra ids are asked for.
        """
        if spec.extra_kind != "none":
            do = "Leave extra ids out, or let transformers run the members."
            raise ConfigError("extra_kind", "none, with an ensemble", spec.extra_kind, do)
        asked = 2 * spec.topk if self._topk is None else max(self._topk, spec.topk)
        wider = replace(spec, topk=min(asked, self._vocab_size), mass=1.0)
        found: list[dict[int, RowScores]] = [{} for _ in self._members]
        with ExitStack() as stack:
            runs = [
                stack.enter_context(closing(_scores_of(member, rows, wider, f"member {number}")))
                for number, member in enumerate(self._members)
            ]
            for step in zip(*runs, strict=True):
                for own, (index, scores) in zip(found, step, strict=True):
                    own[index] = scores
                for index in sorted({index for index, _ in step}):
                    if all(index in own for own in found):
                        sampled_id = rows[index].token[rows[index].targets]
                        every = [own.pop(index) for own in found]
                        yield index, mix(every, self._shares, sampled_id, spec)


def mix(
    scores: Sequence[RowScores], shares: Sequence[float], sampled_id: np.ndarray, spec: ScoreSpec
) -> RowScores:
    """The mixture of several teachers' scores of one row.

    Args:
        scores: one a teacher, without a cut by mass; each with as many entries as are kept or more.
        shares: of the probability, one a teacher; they sum to 1.
        sampled_id: (p,) the tokens that were sampled, whose mixed logprob is exact.
        spec: what is kept.
    """
    shared = [(math.log(share), own) for share, own in zip(shares, scores, strict=True)]
    nothing = np.full(len(sampled_id), -np.inf)
    listed_id = np.concatenate([s.topk_id for s in scores] + [sampled_id[:, None]], 1)
    parts = [log_share + own.topk_logprob.astype(np.float64) for log_share, own in shared]
    listed = np.concatenate([*parts, nothing[:, None]], 1)
    candidate_id, known = _joined(listed_id.astype(np.uint32), listed, len(scores) + 1)
    exact, unlisted, outside = nothing, nothing, nothing
    for log_share, own in shared:
        at_sampled = log_share + own.sampled_logprob.astype(np.float64)
        is_listed = (own.topk_id == sampled_id[:, None]).any(1)
        exact = np.logaddexp(exact, at_sampled)
        unlisted = np.logaddexp(unlisted, np.where(is_listed, -np.inf, at_sampled))
        outside = np.logaddexp(outside, log_share + own.tail_logprob.astype(np.float64))
    logprob = np.where(candidate_id == sampled_id[:, None], exact[:, None], known)
    return keep_likeliest(candidate_id, logprob, _less(outside, unlisted), exact, spec)


def _joined(ids: np.ndarray, part: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each id once in its row, with the sum of its parts; the others become UNUSED_ID and -inf.

    Args:
        ids: (p, C).
        part: (p, C) logs of what is added up.
        most: times that an id can come in a row.
    """
    order = ids.argsort(1, kind="stable")
    ids, part = np.take_along_axis(ids, order, 1), np.take_along_axis(part, order, 1)
    total = part.copy()
    for ahead in range(1, most):
        same = ids[:, ahead:] == ids[:, :-ahead]
        more = np.where(same, part[:, ahead:], -np.inf)
        total[:, :-ahead] = np.logaddexp(total[:, :-ahead], more)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return np.where(again, UNUSED_ID, ids), np.where(again, -np.inf, total)


def _less(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
    """log(exp(whole) - exp(part)); -inf where nothing is left."""
    some = part < whole
    share = np.where(some, part, -np.inf) - np.where(some, whole, 0)
    return np.where(some, whole + np.log1p(-np.exp(share)), -np.inf)


def _scores_of(
    member: Teacher, rows: Sequence[ScoreRow], spec: ScoreSpec, where: str
) -> Generator[tuple[int, RowScores], None, None]:
    try:
        yield from member.score(rows, spec)
    except (NumericsError, InputError) as error:
        raise type(error)(f"{where}, {error.where}", error.expected, error.got, error.do) from error
