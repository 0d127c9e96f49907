"""Scores that belong to other tokens are found, and honest rounding is not."""

import numpy as np
import pytest

from stillroom.cache import agreement
from stillroom.cache.agreement import check_agreement
from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import UNUSED_ID, Arrays
from tests.cache.fakes import VOCAB, dense_scores, log_softmax

POSITIONS = 300
TEACHER_COLUMNS = ["topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob"]


def scored(logit_PV: np.ndarray, token: np.ndarray, topk: int, mass: float = 1.0) -> Arrays:
    """The columns of positions whose sampled tokens are given."""
    scores = dense_scores(logit_PV, token, topk, mass)
    columns = {name: getattr(scores, name) for name in TEACHER_COLUMNS}
    sequence = {"token": token.astype(np.uint32), "scored": np.ones(len(token), np.uint16)}
    return columns | sequence


@pytest.fixture(params=[1.0, 0.8])
def arrays(request: pytest.FixtureRequest) -> Arrays:
    """Some hundred positions, all entries kept or cut by mass."""
    rng = np.random.default_rng(0)
    logit_PV = rng.normal(0, 2, (POSITIONS, VOCAB))
    token = rng.integers(0, VOCAB, POSITIONS)
    token[::2] = logit_PV[::2].argmax(-1)
    return scored(logit_PV, token, 5, request.param)


def test_true_scores_agree(arrays: Arrays) -> None:
    check_agreement(arrays, "part")


@pytest.mark.parametrize("shift", [1, -1, 7])
def test_scores_shifted_by_some_rows_are_found(arrays: Arrays, shift: int) -> None:
    """All of the teacher's columns belong to another position."""
    moved = {name: np.roll(arrays[name], shift, axis=0) for name in TEACHER_COLUMNS}
    with pytest.raises(CorruptError, match=r"^part, position \d+: "):
        check_agreement(arrays | moved, "part")


def test_shuffled_scores_are_found(arrays: Arrays) -> None:
    order = np.random.default_rng(0).permutation(POSITIONS)
    moved = {name: arrays[name][order] for name in TEACHER_COLUMNS}
    with pytest.raises(CorruptError, match=r"^part, position \d+: "):
        check_agreement(arrays | moved, "part")


@pytest.mark.parametrize("name", ["topk_id", "topk_logprob", "sampled_logprob"])
def test_one_column_shifted_is_found(arrays: Arrays, name: str) -> None:
    with pytest.raises(CorruptError, match=r"^part, position \d+: "):
        check_agreement(arrays | {name: np.roll(arrays[name], 1, axis=0)}, "part")


@pytest.mark.parametrize("name", ["topk_logprob", "tail_logprob", "sampled_logprob"])
@pytest.mark.parametrize("block", [65_536, 10])
def test_nan_is_found_at_its_position(
    arrays: Arrays, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "BLOCK_ROWS", block)
    damaged = arrays[name].copy()
    damaged[17] = np.nan
    with pytest.raises(CorruptError, match=r"^part, position 17: "):
        check_agreement(arrays | {name: damaged}, "part")


@pytest.mark.parametrize("change", [0.05, -0.05])
def test_another_mass_is_found(arrays: Arrays, change: float) -> None:
    damaged = arrays["tail_logprob"].copy()
    damaged[9] = np.log(np.exp(float(damaged[9])) + change)
    with pytest.raises(CorruptError, match=r"^part, position 9: .*mass of 1"):
        check_agreement(arrays | {"tail_logprob": damaged}, "part")


def test_a_token_outside_that_is_likelier_than_the_least_kept_is_found(arrays: Arrays) -> None:
    token, sampled = arrays["token"], arrays["sampled_logprob"].copy()
    (outside,) = np.nonzero(~(arrays["topk_id"] == token[:, None]).any(1))
    assert len(outside) > 50
    for at in outside[:50]:
        last = int(arrays["topk_count"][at]) - 1
        likelier = sampled.copy()
        likelier[at] = arrays["topk_logprob"][at, last] + np.float32(0.01)
        with pytest.raises(CorruptError, match=rf"^part, position {at}: "):
            check_agreement(arrays | {"sampled_logprob": likelier}, "part")
        likelier[at] = arrays["topk_logprob"][at, last]
        check_agreement(arrays | {"sampled_logprob": likelier}, "part")


def test_logprobs_beyond_float16_agree() -> None:
    """At a low temperature an entry may be -inf in float16 and finite in float32."""
    logit_PV = np.array([[0.0, -70_000.0, -80_000.0], [0.0, -70_000.0, -80_000.0]])
    arrays = scored(logit_PV, np.array([1, 2]), 2)
    assert np.isneginf(arrays["topk_logprob"][:, 1]).all()
    check_agreement(arrays, "part")


@pytest.mark.parametrize("vocabulary", [2, 40, 50_000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("mass", [1.0, 0.9])
def test_honest_rounding_is_taken(vocabulary: int, scale: float, mass: float) -> None:
    rng = np.random.default_rng(0)
    positions = 200 if vocabulary < 1000 else 20
    logit_PV = rng.normal(0, scale, (positions, vocabulary))
    token = rng.integers(0, vocabulary, positions)
    token[::2] = logit_PV[::2].argmax(-1)
    for topk in {1, 2, min(64, vocabulary)}:
        check_agreement(scored(logit_PV, token, topk, mass), "part")


@pytest.fixture
def with_extra() -> Arrays:
    """Positions with three extra ids each, of which some are unused."""
    rng = np.random.default_rng(1)
    logit_PV = rng.normal(0, 2, (POSITIONS, VOCAB))
    arrays = scored(logit_PV, logit_PV.argmax(-1), 5, 0.8)
    extra_id = rng.integers(0, VOCAB, (POSITIONS, 3)).astype(np.uint32)
    logprob = np.take_along_axis(log_softmax(logit_PV), extra_id.astype(int), 1)
    extra_id[::3, 2], logprob[::3, 2] = UNUSED_ID, -np.inf
    return arrays | {"extra_id": extra_id, "extra_logprob": logprob.astype(np.float16)}


def test_extra_ids_agree_with_the_entries(with_extra: Arrays) -> None:
    check_agreement(with_extra, "part")


@pytest.mark.parametrize("kept", [True, False])
def test_an_extra_id_with_another_logprob_is_found(with_extra: Arrays, kept: bool) -> None:
    """Of a kept token it must be the entry's; any other may not be above the least entry."""
    among = (with_extra["extra_id"][:, :1] == with_extra["topk_id"]).any(1)
    at = int(np.flatnonzero(among == kept)[0])
    damaged = with_extra["extra_logprob"].copy()
    damaged[at, 0] = np.float16(-0.001)
    with pytest.raises(CorruptError, match=rf"^part, position {at}, extra id \d+: "):
        check_agreement(with_extra | {"extra_logprob": damaged}, "part")
