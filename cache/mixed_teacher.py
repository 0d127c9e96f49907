"""The mixture of several teachers of which only the likeliest tokens are known: entries are lower
bounds, and what no list tells stays in the tail.

`docs/several-teachers.md` has the bounds and their proofs. Where members give full vocabularies,
`full_logits` mixes them exactly.

Shapes: p positions, C candidates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from stillroom.cache.entries import keep_likeliest
from stillroom.cache.errors import ConfigError, InputError, NumericsError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher, stats_of

GROUP_TOKENS = 1 << 16
"""Tokens of the rows that one member scores before the next one does."""


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

    def stats(self) -> dict[str, float]:
        """Sums of what the members tell; see `teacher.stats_of`."""
        total: dict[str, float] = {}
        for told in map(stats_of, self._members):
            total |= {name: total.get(name, 0.0) + value for name, value in told.items()}
        return total

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows, a group of them at a time; see `teacher.Teacher`.

        Raises:
            ConfigError: extra ids are asked for.
        """
        if spec.extra_kind != "none":
            do = "Leave extra ids out, or let transformers run the members."
            raise ConfigError("extra_kind", "none, with an ensemble", spec.extra_kind, do)
        asked = 2 * spec.topk if self._topk is None else max(self._topk, spec.topk)
        wider = replace(spec, topk=min(asked, self._vocab_size), mass=1.0)
        for start, stop in _groups(rows):
            found = [
                _scores_of(member, rows[start:stop], wider, f"member {number}, rows from {start}")
                for number, member in enumerate(self._members)
            ]
            for index in range(start, stop):
                row, scores = rows[index], [own[index - start] for own in found]
                yield index, mix(scores, self._shares, row.token[row.targets], spec)


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
    listed_id = np.concatenate([s.topk_id for s in scores] + [sampled_id[:, None]], 1)
    parts = [w * _exp(s.topk_logprob) for w, s in zip(shares, scores, strict=True)]
    listed = np.concatenate([*parts, np.zeros((len(sampled_id), 1))], 1)
    candidate_id, known = _joined(listed_id.astype(np.uint32), listed, len(scores) + 1)
    exact, unlisted, outside = (np.zeros(len(sampled_id)) for _ in range(3))
    for share, own in zip(shares, scores, strict=True):
        at_sampled = share * _exp(own.sampled_logprob)
        exact += at_sampled
        unlisted += np.where((own.topk_id == sampled_id[:, None]).any(1), 0, at_sampled)
        outside += share * _exp(own.tail_logprob)
    probability = np.where(candidate_id == sampled_id[:, None], exact[:, None], known)
    with np.errstate(divide="ignore"):
        sampled_logprob = np.log(exact)
    return keep_likeliest(
        candidate_id, probability, np.maximum(outside - unlisted, 0), sampled_logprob, spec
    )


def _joined(ids: np.ndarray, part: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each id once in its row, with the sum of its parts; UNUSED_ID and 0 in place of the others.

    Args:
        ids: (p, C).
        part: (p, C) what is added up.
        most: times that an id can come in a row.
    """
    order = ids.argsort(1, kind="stable")
    ids, part = np.take_along_axis(ids, order, 1), np.take_along_axis(part, order, 1)
    total = part.copy()
    for ahead in range(1, most):
        same = ids[:, ahead:] == ids[:, :-ahead]
        total[:, :-ahead] += np.where(same, part[:, ahead:], 0)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return np.where(again, UNUSED_ID, ids), np.where(again, 0, total)


def _exp(logprob: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(logprob, dtype=np.float64))


def _groups(rows: Sequence[ScoreRow]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about GROUP_TOKENS tokens; one row at least."""
    start, tokens = 0, 0
    for index, row in enumerate(rows):
        if tokens and tokens + len(row.token) > GROUP_TOKENS:
            yield start, index
            start, tokens = index, 0
        tokens += len(row.token)
    if tokens:
        yield start, len(rows)


def _scores_of(
    member: Teacher, rows: Sequence[ScoreRow], spec: ScoreSpec, where: str
) -> dict[int, RowScores]:
    try:
        return dict(member.score(rows, spec))
    except (NumericsError, InputError) as error:
        raise type(error)(f"{where}, {error.where}", error.expected, error.got, error.do) from error
