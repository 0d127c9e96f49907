"""What is kept of full rows of logits, against a twin in float64 that goes position by position.

Shapes: P positions, V vocabulary, K entries, M extra ids.
"""

import math

import numpy as np
import pytest
import torch

from stillroom.cache.errors import NumericsError
from stillroom.cache.rounded import rounded
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.summarise import summarise
from stillroom.cache.tail_draws import uniforms
from stillroom.cache.teacher import RowScores, ScoreSpec
from tests.cache.fakes import dense_scores, log_softmax, same_bits

SPEC = ScoreSpec(topk=2)


def scores_of(logit_PV: np.ndarray, sampled_P: np.ndarray, spec: ScoreSpec) -> RowScores:
    """What is stored of rows of logits."""
    logits = torch.from_numpy(logit_PV.astype(np.float32)) / spec.temperature
    found = summarise(logits, torch.from_numpy(sampled_P), spec, np.zeros(len(logit_PV)))
    return rounded({name: column.numpy() for name, column in found.items()})


def assert_equal(found: RowScores, expected: RowScores) -> None:
    """The same entries; logprobs to the arithmetic before their rounding."""
    assert same_bits(found.topk_count, expected.topk_count)
    unused = found.topk_id == UNUSED_ID
    assert (unused == (expected.topk_id == UNUSED_ID)).all()
    assert np.isneginf(found.topk_logprob[unused]).all()
    assert (found.topk_id == expected.topk_id).mean() > 0.95
    for name in ("topk_logprob", "tail_logprob"):
        got, want = (getattr(s, name).astype(np.float64) for s in (found, expected))
        np.testing.assert_allclose(got, want, rtol=2**-10, atol=2e-4)
    np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=2e-5)


@pytest.mark.parametrize("mass", [1.0, 0.999, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("topk", [1, 8, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_entries_and_tail_equal_the_twins(mass: float, topk: int, temperature: float) -> None:
    rng = np.random.default_rng([topk, int(temperature * 10)])
    logit_PV = (rng.normal(0, 1, (60, 50)) * rng.uniform(0, 8, (60, 1))).astype(np.float32)
    sampled_P = rng.integers(0, 50, 60)
    spec = ScoreSpec(topk=topk, temperature=temperature, mass=mass)
    found = scores_of(logit_PV, sampled_P, spec)
    assert_equal(found, dense_scores(logit_PV / np.float32(temperature), sampled_P, topk, mass))


@pytest.mark.parametrize(("mass", "count"), [(0.125, 1), (0.13, 2), (0.5, 4), (0.51, 5), (0.99, 8)])
def test_of_equal_tokens_the_lower_ids_are_kept_until_the_mass_is_hit(
    mass: float, count: int
) -> None:
    found = scores_of(np.full((3, 8), 2.5), np.zeros(3, np.int64), ScoreSpec(topk=8, mass=mass))
    assert found.topk_count.tolist() == [count] * 3
    kept = [*range(count), *[UNUSED_ID] * (8 - count)]
    assert found.topk_id.tolist() == [kept] * 3
    assert np.isneginf(found.topk_logprob[:, count:]).all()
    rest = math.log(1 - count / 8) if count < 8 else -math.inf
    assert found.tail_logprob.tolist() == pytest.approx([rest] * 3, rel=1e-3)


def test_a_mass_of_one_keeps_all_though_one_token_has_it() -> None:
    logit_PV = np.array([[90.0, 0.0, -5.0, -9.0]])
    assert scores_of(logit_PV, np.array([0]), ScoreSpec(topk=3)).topk_count.tolist() == [3]
    peaked = scores_of(logit_PV, np.array([0]), ScoreSpec(topk=3, mass=0.9999))
    assert peaked.topk_count.tolist() == [1]
    assert peaked.tail_logprob.tolist() == pytest.approx([-90], rel=1e-3)


def test_k_caps_what_the_mass_asks_for() -> None:
    found = scores_of(np.zeros((1, 100)), np.array([0]), ScoreSpec(topk=10, mass=0.9))
    assert found.topk_count.tolist() == [10]
    assert found.tail_logprob.tolist() == pytest.approx([math.log(0.9)], rel=1e-3)


def test_the_tail_is_summed_over_the_complement_in_full_precision() -> None:
    """A tail of 1e-7 beside probabilities near 1 would drown in one minus their float32 sum."""
    logit_PV = np.array([[0.0, math.log(1e-3), *[math.log(1e-10)] * 1000]])
    found = scores_of(logit_PV, np.array([0]), ScoreSpec(topk=64, mass=0.9999))
    assert found.topk_count.tolist() == [2]
    assert float(found.tail_logprob[0]) == pytest.approx(math.log(1e-7 / 1.0010001), rel=1e-3)


def test_what_is_below_the_range_of_float16_is_no_probability() -> None:
    found = scores_of(np.array([[0.0, -70_000.0, -80_000.0]]), np.array([1]), SPEC)
    assert found.topk_id.tolist() == [[0, 1]]
    assert found.topk_logprob.tolist() == [[0.0, -np.inf]]
    assert found.topk_count.tolist() == [2]
    assert found.tail_logprob.tolist() == [-np.inf]
    assert found.sampled_logprob.tolist() == [-70_000.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_logits_that_are_not_finite_name_their_row(bad: float, whole: bool) -> None:
    logit_PV = torch.zeros(6, 9)
    logit_PV[4, None if whole or bad == -torch.inf else 3] = bad
    rows = np.array([7, 7, 3, 3, 5, 5])
    with pytest.raises(NumericsError, match=r"^row 5: expected finite teacher logits; got NaN, "):
        summarise(logit_PV, torch.zeros(6, dtype=torch.int64), SPEC, rows)


def test_masked_logits_are_no_error() -> None:
    logit_PV = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    found = summarise(logit_PV, torch.tensor([1]), SPEC, np.array([0]))
    assert found["topk_id"].tolist() == [[0, 1]]
    torch.testing.assert_close(found["topk_logprob"], torch.full((1, 2), 0.5).log())
    torch.testing.assert_close(found["sampled_logprob"], torch.tensor([0.5]).log())
    assert found["tail_logprob"].tolist() == [-torch.inf]


def test_student_ids_get_their_full_logprob_wherever_they_are() -> None:
    rng = np.random.default_rng(0)
    logit_PV = rng.normal(0, 2, (20, 12)).astype(np.float32)
    id_PM = rng.integers(0, 12, (20, 3))
    id_PM[::4, 1:] = UNUSED_ID
    spec = ScoreSpec(topk=4, mass=0.8, extra=3, extra_kind="student")
    found = summarise(
        torch.from_numpy(logit_PV.copy()),
        torch.zeros(20, dtype=torch.int64),
        spec,
        np.zeros(20),
        extra_id_PM=torch.from_numpy(id_PM),
    )
    scores = rounded({name: column.numpy() for name, column in found.items()})
    assert scores.extra_id is None
    assert scores.extra_behaviour_logprob is None
    assert scores.extra_logprob is not None
    unused = id_PM == UNUSED_ID
    expected = np.take_along_axis(log_softmax(logit_PV), np.where(unused, 0, id_PM), 1)
    expected[unused] = -np.inf
    assert scores.extra_logprob.dtype == np.float16
    np.testing.assert_allclose(scores.extra_logprob, expected, rtol=1e-3, atol=1e-4)


def test_draws_are_from_the_tail_with_both_of_their_logprobs() -> None:
    rng = np.random.default_rng(1)
    logit_PV = rng.normal(0, 2, (30, 12)).astype(np.float32)
    logit_PV[7, 3:] = -np.inf
    spec = ScoreSpec(topk=3, mass=1.0, extra=5, extra_kind="tail")
    found = summarise(
        torch.from_numpy(logit_PV.copy()),
        torch.zeros(30, dtype=torch.int64),
        spec,
        np.zeros(30),
        uniform_PM=torch.from_numpy(uniforms(3, 30, 5)),
    )
    scores = rounded({name: column.numpy() for name, column in found.items()})
    drawn, logprob, given = scores.extra_id, scores.extra_logprob, scores.extra_behaviour_logprob
    assert drawn is not None
    assert logprob is not None
    assert given is not None
    dtypes = [str(column.dtype) for column in (drawn, logprob, given)]
    assert dtypes == ["uint32", "float16", "float32"]
    assert (drawn[7] == UNUSED_ID).all()
    assert np.isneginf(logprob[7]).all()
    assert np.isnan(given[7]).all()
    full_PV = log_softmax(logit_PV)
    for p in set(range(30)) - {7}:
        assert not set(drawn[p].tolist()) & set(scores.topk_id[p].tolist())
        own = full_PV[p, drawn[p].astype(int)]
        np.testing.assert_allclose(logprob[p], own, rtol=1e-3)
        tail = np.logaddexp.reduce(np.delete(full_PV[p], scores.topk_id[p].astype(int)))
        np.testing.assert_allclose(given[p], own - tail, atol=2e-5)


@pytest.mark.parametrize("mass", [1.0, 0.5])
@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_the_rest_counts_and_is_never_an_entry(mass: float, shift: float) -> None:
    """As if its tokens had columns that no entry is taken from."""
    rng = np.random.default_rng(3)
    logit_PV = rng.normal(0, 3, (40, 30)).astype(np.float32)
    rest_PR = (rng.normal(0, 3, (40, 5)) + shift).astype(np.float32)
    rest_P1 = torch.from_numpy(rest_PR).logsumexp(-1, keepdim=True)
    sampled_P = torch.from_numpy(rng.integers(0, 30, 40))
    spec = ScoreSpec(topk=4, mass=mass)
    found = summarise(
        torch.from_numpy(logit_PV.copy()), sampled_P, spec, np.zeros(40), rest_P1=rest_P1
    )
    logprob_PV = log_softmax(np.concatenate([logit_PV, rest_PR], 1))[:, :30]
    for p, count in enumerate(found["topk_count"].tolist()):
        best = np.argsort(-logprob_PV[p])[:count]
        assert found["topk_id"][p, :count].tolist() == best.tolist()
        np.testing.assert_allclose(
            found["topk_logprob"][p, :count], logprob_PV[p][best], rtol=1e-5, atol=1e-5
        )
        covered = np.exp(logprob_PV[p][best]).sum()
        tail = float(found["tail_logprob"][p])
        assert np.exp(tail) == pytest.approx(1 - covered, abs=1e-5)
        assert count == 4 or (mass == 0.5 and covered >= 0.5)
        sampled = logprob_PV[p, sampled_P[p]]
        assert float(found["sampled_logprob"][p]) == pytest.approx(sampled, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rest_that_is_not_finite_names_its_row(bad: float) -> None:
    rest_P1 = torch.tensor([[0.0], [bad]])
    with pytest.raises(NumericsError, match=r"^row 7"):
        summarise(
            torch.zeros(2, 5),
            torch.zeros(2, dtype=torch.int64),
            SPEC,
            np.array([6, 7]),
            rest_P1=rest_P1,
        )
