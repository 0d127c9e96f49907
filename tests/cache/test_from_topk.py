"""What is kept of the K likeliest tokens, against what is kept of full rows of logits."""

import math

import numpy as np
import pytest

from stillroom.cache.errors import NumericsError
from stillroom.cache.from_topk import scores_from_topk
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreSpec
from tests.cache.fakes import dense_scores, log_softmax, same_bits


def from_logits(logit_PV: np.ndarray, sampled_P: np.ndarray, spec: ScoreSpec) -> RowScores:
    """As an engine would tell it: the K likeliest in no order, and the sampled token."""
    logprob_PV = log_softmax(logit_PV).astype(np.float32)
    topk_id = np.argpartition(-logprob_PV, spec.topk - 1, axis=1)[:, : spec.topk]
    sampled = np.take_along_axis(logprob_PV, sampled_P[:, None], 1)[:, 0]
    topk_logprob = np.take_along_axis(logprob_PV, topk_id, 1)
    return scores_from_topk(topk_id, topk_logprob, sampled_P, sampled, spec)


@pytest.mark.parametrize("mass", [1.0, 0.999, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("topk", [1, 8, 49])
def test_entries_and_tail_equal_those_of_full_rows(mass: float, topk: int) -> None:
    rng = np.random.default_rng(topk)
    logit_PV = rng.normal(0, 1, (200, 50)) * rng.uniform(0.1, 4, (200, 1))
    sampled_P = rng.integers(0, 50, 200)
    spec = ScoreSpec(topk=topk, mass=mass)
    found = from_logits(logit_PV, sampled_P, spec)
    expected = dense_scores(logit_PV, sampled_P, topk, mass)
    assert same_bits(found.topk_count, expected.topk_count)
    assert (found.topk_id == expected.topk_id).mean() > 0.99
    assert same_bits(found.topk_id == UNUSED_ID, expected.topk_id == UNUSED_ID)
    np.testing.assert_allclose(found.topk_logprob, expected.topk_logprob, rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)
    mine, theirs = (np.exp(s.tail_logprob.astype(np.float64)) for s in (found, expected))
    np.testing.assert_allclose(mine, theirs, rtol=4e-3, atol=2e-6)


def test_a_whole_vocabulary_has_next_to_no_tail() -> None:
    rng = np.random.default_rng(0)
    found = from_logits(rng.normal(0, 2, (50, 8)), np.zeros(50, np.int64), ScoreSpec(topk=8))
    assert np.exp(found.tail_logprob.astype(np.float64)).max() < 1e-6


def test_a_tail_that_float32_lost_holds_the_sampled_token() -> None:
    """Or else a bucket of the tail without the sampled token would have less than no mass. What is
    left has no probability that float64 could hold."""
    topk = np.log(np.array([[0.5, 0.5000001]], np.float32))
    for nats in (-20.0, -800.0):
        sampled = np.array([nats], np.float32)
        found = scores_from_topk(
            np.array([[5, 6]]), topk, np.array([7]), sampled, ScoreSpec(topk=2)
        )
        assert found.tail_logprob.tolist() == [nats]
    listed = scores_from_topk(
        np.array([[5, 6]]), topk, np.array([5]), topk[:, 0], ScoreSpec(topk=2)
    )
    assert listed.tail_logprob.tolist() == [-math.inf]


def test_a_sampled_token_as_likely_as_the_least_entry_is_in_the_tail() -> None:
    logprob = np.full((2, 4), -27, np.float32)
    logprob[:, 0] = 0
    sampled_id = np.array([500, 3])
    found = scores_from_topk(
        np.tile(np.arange(4), (2, 1)), logprob, sampled_id, logprob[:, 3], ScoreSpec(topk=4)
    )
    assert found.tail_logprob.tolist() == [-27.0, -math.inf]


def test_entries_that_the_mass_leaves_out_are_summed_exactly() -> None:
    """Their 3e-8 is far below what float32 leaves of 1 less the rest."""
    logprob = np.log(np.array([[1e-8, 1.0, 2e-8]]))
    found = scores_from_topk(
        np.array([[1, 2, 3]]), logprob, np.array([2]), logprob[:, 1], ScoreSpec(topk=3, mass=0.9)
    )
    assert found.topk_count.tolist() == [1]
    assert found.topk_id.tolist() == [[2, UNUSED_ID, UNUSED_ID]]
    assert float(found.tail_logprob[0]) == pytest.approx(math.log(3e-8), rel=1e-3)


def test_of_equal_tokens_the_mass_keeps_the_lower_ids() -> None:
    logprob = np.full((1, 4), math.log(0.25))
    spec = ScoreSpec(topk=4, mass=0.49)
    found = scores_from_topk(np.array([[9, 3, 7, 1]]), logprob, np.array([9]), logprob[:, 0], spec)
    assert found.topk_id.tolist() == [[1, 3, UNUSED_ID, UNUSED_ID]]
    assert float(found.tail_logprob[0]) == pytest.approx(math.log(0.5), rel=1e-3)


def test_an_entry_without_probability_is_kept_as_such() -> None:
    logprob = np.array([[math.log(0.75), -math.inf]])
    found = scores_from_topk(
        np.array([[4, 5]]), logprob, np.array([5]), logprob[:, 1], ScoreSpec(topk=2)
    )
    assert found.topk_id.tolist() == [[4, 5]]
    assert found.topk_logprob[0, 1] == found.sampled_logprob[0] == -math.inf
    assert float(found.tail_logprob[0]) == pytest.approx(math.log(0.25), rel=1e-3)


@pytest.mark.parametrize(
    ("topk_logprob", "sampled"),
    [
        ([math.nan, -1.0], -1.0),
        ([-1.0, -1.0], math.nan),
        ([math.inf, -1.0], -1.0),
        ([-math.inf, -math.inf], -1.0),
        ([0.0, -1.0], -1.0),
        ([-1.0, -1.0], 0.5),
        ([math.log(0.5001), math.log(0.5001)], -1.0),
        ([3.0, 7.0], -1.0),
    ],
)
def test_what_is_no_distribution_names_its_row_and_position(
    topk_logprob: list[float], sampled: float
) -> None:
    good = [math.log(0.5), math.log(0.25)]
    with pytest.raises(NumericsError, match=r"^row 7, position 1: expected log probabilities"):
        scores_from_topk(
            np.array([[1, 2], [1, 2]]),
            np.array([good, topk_logprob]),
            np.array([1, 3]),
            np.array([good[0], sampled]),
            ScoreSpec(topk=2),
            "row 7",
        )
