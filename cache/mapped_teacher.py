"""A teacher that reads and answers in its own ids, for a cache that holds a student's. Where the
teacher gives full vocabularies, `mapped_logits` does the same exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from stillroom.cache.entries import keep_likeliest
from stillroom.cache.id_map import IdMap
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import (
    RowScores,
    ScoreRow,
    ScoreSpec,
    Teacher,
    longest_row_of,
    stats_of,
)


class MappedTeacher:
    """A teacher, in a student's ids.

    Of each position as many entries more are asked for as there are tokens that only the teacher
    has, ids without a token among them, since the engine may list those too; they are taken out,
    and their probability goes to the tail.

    Args:
        teacher: in its own ids.
        id_map: from the student's ids to its own.
    """

    def __init__(self, teacher: Teacher, id_map: IdMap) -> None:
        """Bind them."""
        self._teacher, self._map = teacher, id_map
        self._more = len(id_map.teacher_only)

    @property
    def numeric_class(self) -> str:
        """The teacher's."""
        return self._teacher.numeric_class

    @property
    def longest_row(self) -> int | None:
        """The teacher's; see `teacher.longest_row_of`."""
        return longest_row_of(self._teacher)

    def stats(self) -> dict[str, float]:
        """The teacher's; see `teacher.stats_of`."""
        return stats_of(self._teacher)

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`; rows and scores are in the student's ids."""
        topk = min(spec.topk + self._more, self._map.teacher_vocab_size)
        wider = replace(spec, topk=topk, mass=1.0 if self._more else spec.mass)
        for index, scores in self._teacher.score([self._mapped(row) for row in rows], wider):
            yield index, self._mapped_back(scores, spec)

    def _mapped(self, row: ScoreRow) -> ScoreRow:
        extra = None if row.extra_id is None else self._map.to_teacher(row.extra_id)
        return replace(row, token=self._map.to_teacher(row.token), extra_id=extra)

    def _mapped_back(self, scores: RowScores, spec: ScoreSpec) -> RowScores:
        extra = None if scores.extra_id is None else self._map.to_student(scores.extra_id)
        own_id = self._map.to_student(scores.topk_id)
        if not self._more:
            order = np.lexsort((own_id, -scores.topk_logprob.astype(np.float32)), axis=-1)
            return replace(
                scores,
                topk_id=np.take_along_axis(own_id, order, -1),
                topk_logprob=np.take_along_axis(scores.topk_logprob, order, -1),
                extra_id=extra,
            )
        listed, foreign = scores.topk_logprob.astype(np.float64), own_id == UNUSED_ID
        taken_out = np.logaddexp.reduce(np.where(foreign, listed, -np.inf), -1)
        outside = np.logaddexp(scores.tail_logprob, taken_out)
        own, sampled = np.where(foreign, -np.inf, listed), scores.sampled_logprob
        kept = keep_likeliest(own_id, own, outside, sampled, spec)
        return replace(kept, extra_id=extra, extra_logprob=scores.extra_logprob)
