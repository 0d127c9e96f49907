"""A teacher with ids of its own behind a cache of a student's: the scores of the same tokens, and
the rest of its probability in the tail."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from stillroom.cache.agreement import check_agreement
from stillroom.cache.id_map import IdMap
from stillroom.cache.mapped_teacher import MappedTeacher
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, stats_of
from tests.cache.fakes import VOCAB, FakeTeacher, dense_scores, log_softmax

RNG = np.random.default_rng(5)


def make_map(own: int, width: int = VOCAB) -> IdMap:
    """The first `own` ids of a shuffled vocabulary."""
    ids = np.random.default_rng(1).permutation(width)[:own].astype(np.uint32)
    return IdMap(teacher_id=ids, teacher_vocab_size=width, tokenizer="s", teacher_tokenizer="t")


def make_rows(own: int, *lengths: int, extra: int = 0) -> list[ScoreRow]:
    """Rows of a student's ids."""
    rows = []
    for length in lengths:
        token = RNG.integers(0, own, length).astype(np.uint32)
        ids = RNG.integers(0, own, (length - 1, extra)).astype(np.uint32)
        rows.append(ScoreRow(token, np.arange(1, length), ids if extra else None, length))
    return rows


def expected_of(
    teacher: FakeTeacher, id_map: IdMap, row: ScoreRow, spec: ScoreSpec
) -> tuple[np.ndarray, RowScores]:
    """Log probabilities (p, own ids) over the teacher's whole vocabulary; and scores of them alone,
    whose tails lack what is not theirs."""
    token = id_map.to_teacher(row.token)
    logprob = log_softmax(teacher.logit_VV[token[row.targets - 1]] / spec.temperature)
    own = logprob[:, id_map.teacher_id]
    return own, dense_scores(own, row.token[row.targets], spec.topk)


@pytest.mark.parametrize("own", [VOCAB, VOCAB - 1, 25])
@pytest.mark.parametrize("mass", [1.0, 0.6])
def test_own_tokens_have_the_teachers_probabilities(own: int, mass: float) -> None:
    teacher, id_map = FakeTeacher(), make_map(own)
    rows, spec = make_rows(own, 6, 2, 9), ScoreSpec(topk=5, mass=mass)
    found = dict(MappedTeacher(teacher, id_map).score(rows, spec))
    for index, row in enumerate(rows):
        logprob, _ = expected_of(teacher, id_map, row, spec)
        scores = found[index]
        for p, count in enumerate(scores.topk_count):
            ids = scores.topk_id[p, :count]
            order = np.lexsort((np.arange(own), -logprob[p].astype(np.float16).astype(float)))
            assert ids.tolist() == order[:count].tolist()
            stored = scores.topk_logprob[p, :count].astype(float)
            np.testing.assert_allclose(stored, logprob[p][ids], rtol=2e-3, atol=2e-4)
            tail = 1 - np.exp(logprob[p][ids]).sum()
            assert np.exp(float(scores.tail_logprob[p])) == pytest.approx(tail, abs=3e-3)
            reached = np.exp(logprob[p][ids])
            assert count == 5 or reached.sum() > mass - 5e-3
            assert mass == 1 or reached[:-1].sum() < mass + 5e-3
        sampled = logprob[np.arange(len(row.targets)), row.token[row.targets]]
        np.testing.assert_allclose(scores.sampled_logprob, sampled, atol=1e-5)
        check_agreement(
            {
                "token": row.token[row.targets],
                "scored": np.ones(len(row.targets), int),
                "topk_id": scores.topk_id,
                "topk_logprob": scores.topk_logprob,
                "topk_count": scores.topk_count,
                "tail_logprob": scores.tail_logprob,
                "sampled_logprob": scores.sampled_logprob,
            },
            "part",
        )


def test_ids_of_the_student_are_scored() -> None:
    teacher, id_map = FakeTeacher(), make_map(30)
    spec = ScoreSpec(topk=4, extra=3, extra_kind="student")
    (row,) = make_rows(30, 7, extra=3)
    assert row.extra_id is not None
    row.extra_id[0, 2] = UNUSED_ID
    ((_, scores),) = MappedTeacher(teacher, id_map).score([row], spec)
    logprob, _ = expected_of(teacher, id_map, row, spec)
    at = np.take_along_axis(logprob, np.where(row.extra_id < 30, row.extra_id, 0).astype(int), 1)
    at[0, 2] = -np.inf
    assert scores.extra_logprob is not None
    assert (scores.extra_logprob == at.astype(np.float16)).all()


def test_draws_of_a_teacher_with_the_same_tokens_are_mapped_back() -> None:
    teacher, id_map = FakeTeacher(), make_map(VOCAB)
    spec = ScoreSpec(topk=4, extra=6, extra_kind="tail")
    (row,) = make_rows(VOCAB, 7)
    ((_, scores),) = MappedTeacher(teacher, id_map).score([row], spec)
    logprob, _ = expected_of(teacher, id_map, row, spec)
    assert scores.extra_id is not None
    assert scores.extra_logprob is not None
    at = np.take_along_axis(logprob, scores.extra_id.astype(int), 1)
    assert (scores.extra_logprob == at.astype(np.float16)).all()


def test_what_the_teacher_tells_of_its_work_is_told() -> None:
    class Telling(FakeTeacher):
        def stats(self) -> dict[str, float]:
            return {"model_s": 1.5}

    assert stats_of(MappedTeacher(Telling(), make_map(9))) == {"model_s": 1.5}
    assert stats_of(MappedTeacher(FakeTeacher(), make_map(9))) == {}


def test_entries_keep_the_logprobs_that_the_teacher_gave() -> None:
    """Float64 holds no probability below -745 nats; only the teacher has the likeliest token."""

    class Certain(FakeTeacher):
        def __init__(self) -> None:
            super().__init__()
            self.logit_VV = np.full((VOCAB, VOCAB), -900.0)
            self.logit_VV[:, make_map(VOCAB).teacher_id[[-1, 0]]] = 0.0, -800.0

    token = np.zeros(2, np.uint32)
    ((_, scores),) = MappedTeacher(Certain(), make_map(VOCAB - 1)).score(
        [ScoreRow(token, np.array([1]))], ScoreSpec(topk=1)
    )
    assert scores.topk_id.tolist() == [[0]]
    assert scores.topk_logprob.tolist() == [[-800.0]]
    assert scores.sampled_logprob.tolist() == [-800.0]
    assert scores.tail_logprob.tolist() == [0.0]


def test_what_the_teacher_is_asked_for() -> None:
    class Asked(FakeTeacher):
        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            asked.append(spec)
            return super().score(rows, spec)

    asked: list[ScoreSpec] = []
    spec = ScoreSpec(topk=4, mass=0.5)
    for own in (VOCAB, VOCAB - 3, 10):
        teacher = MappedTeacher(Asked(), make_map(own))
        assert teacher.numeric_class == "fake-1-float32-cpu"
        list(teacher.score(make_rows(own, 3), spec))
    assert asked == [spec, replace(spec, topk=7, mass=1.0), replace(spec, topk=34, mass=1.0)]
