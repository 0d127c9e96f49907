"""From candidates and what is outside of them to a position's entries and tail."""

import numpy as np
import pytest

from stillroom.cache.entries import keep_likeliest
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreSpec

ID = np.array([[7, 3, UNUSED_ID, 9, 5]], np.uint32)
PROBABILITY = np.array([[0.125, 0.25, 0.0, 0.125, 0.3125]])
OUTSIDE = np.array([0.1875])


def kept(**spec: float) -> RowScores:
    """What is kept of one position."""
    with np.errstate(divide="ignore"):
        logprob = np.log(PROBABILITY)
    return keep_likeliest(ID, logprob, np.log(OUTSIDE), np.array([-1.5]), ScoreSpec(**spec))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("topk", "mass", "ids", "tail"),
    [
        (4, 1.0, [5, 3, 7, 9], 0.1875),
        (3, 1.0, [5, 3, 7], 0.3125),
        (1, 1.0, [5], 0.6875),
        (4, 0.5, [5, 3], 0.4375),
        (4, 0.3, [5], 0.6875),
        (2, 0.9, [5, 3], 0.4375),
    ],
)
def test_the_likeliest_are_kept_and_the_rest_is_the_tail(
    topk: int, mass: float, ids: list[int], tail: float
) -> None:
    """Of equal ones the lower id; what a cut leaves out counts in the tail."""
    found = kept(topk=topk, mass=mass)
    assert found.topk_count.tolist() == [len(ids)]
    assert found.topk_id[0].tolist() == ids + [UNUSED_ID] * (topk - len(ids))
    mine = dict(zip(ID[0].tolist(), PROBABILITY[0], strict=True))
    expected = np.log([mine[i] for i in ids]).astype(np.float16)
    assert found.topk_logprob[0, : len(ids)].tolist() == expected.tolist()
    assert (found.topk_logprob[0, len(ids) :] == -np.inf).all()
    assert found.tail_logprob[0] == np.float16(np.log(tail))
    assert found.sampled_logprob.tolist() == [-1.5]


def test_no_tail_is_minus_infinity() -> None:
    found = keep_likeliest(
        np.array([[1, 0]], np.uint32),
        np.log([[0.75, 0.25]]),
        np.array([-np.inf]),
        np.zeros(1),
        ScoreSpec(topk=2),
    )
    assert found.tail_logprob.tolist() == [-np.inf]


@pytest.mark.parametrize(("mass", "count", "tail"), [(1.0, 2, -900.0), (0.5, 1, -800.0)])
def test_what_has_no_probability_in_float64_has_a_logprob(
    mass: float, count: int, tail: float
) -> None:
    found = keep_likeliest(
        np.array([[UNUSED_ID, 4, 6]], np.uint32),
        np.array([[-np.inf, -800.0, 0.0]]),
        np.array([-900.0]),
        np.array([-800.0]),
        ScoreSpec(topk=2, mass=mass),
    )
    assert found.topk_id[0, :count].tolist() == [6, 4][:count]
    assert found.topk_logprob[0, :count].tolist() == [0.0, -800.0][:count]
    assert found.tail_logprob.tolist() == [tail]
