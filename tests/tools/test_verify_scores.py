"""What is wrong with the numbers of a shard is found, one rule after another."""

from typing import Any

import numpy as np
import pytest

from stillroom.cache.agreement import check_agreement
from stillroom.cache.errors import StillroomError
from stillroom.cache.identity import Identity
from stillroom.cache.schema import UNUSED_ID, Arrays
from stillroom.cache.score_rows import score_columns
from stillroom.cache.teacher import ScoreRow, ScoreSpec
from stillroom.tools.verify_scores import check_scores, score_names
from tests.cache.fakes import VOCAB, FakeTeacher, make_identity

POSITIONS = 200


def arrays_of(identity: Identity) -> Arrays:
    """Positions as the fake teacher scores them."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, VOCAB, POSITIONS + 1).astype(np.uint32)
    extra_id = None
    if identity.student_extra:
        extra_id = rng.integers(0, VOCAB, (POSITIONS, identity.extra)).astype(np.uint32)
        extra_id[::3, 1:] = UNUSED_ID
    row = ScoreRow(token, np.arange(1, POSITIONS + 1), extra_id, seed=3)
    ((_, scores),) = FakeTeacher().score([row], ScoreSpec.of(identity))
    arrays = score_columns([scores])
    if extra_id is not None:
        unknown = np.full(extra_id.shape, np.nan, np.float32)
        arrays |= {"extra_id": extra_id, "extra_behaviour_logprob": unknown}
    return arrays | {"token": token[1:], "scored": np.ones(POSITIONS, np.uint16)}


KINDS: list[dict[str, Any]] = [
    {},
    {"mass": 0.7},
    {"mass": 0.7, "topk": VOCAB},
    {"extra": 3, "extra_kind": "student"},
    {"mass": 0.7, "extra": 3, "extra_kind": "tail"},
    {"topk": VOCAB, "extra": 3, "extra_kind": "tail"},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_true_scores_are_taken(settings: dict[str, Any]) -> None:
    identity = make_identity(**settings)
    arrays = arrays_of(identity)
    assert set(score_names(identity)) == arrays.keys() - {"token", "scored"}
    check_scores(arrays, identity, "here")


def test_more_entries_than_cover_the_mass_are_found() -> None:
    with pytest.raises(StillroomError, match=r"no entry beyond 0\.7; got \d+ positions with more"):
        check_scores(arrays_of(make_identity(mass=0.8)), make_identity(mass=0.7), "here")


def test_fewer_entries_than_cover_the_mass_are_found() -> None:
    with pytest.raises(StillroomError, match=r"that cover 0\.7; got \d+ positions with fewer"):
        check_scores(arrays_of(make_identity(mass=0.6)), make_identity(mass=0.7), "here")
    with pytest.raises(StillroomError, match=r"5 entries each; got \d+ positions with fewer"):
        check_scores(arrays_of(make_identity(mass=0.7)), make_identity(), "here")


@pytest.mark.parametrize(
    ("name", "at", "value", "named"),
    [
        ("topk_id", (4, 0), VOCAB, "topk_id below 40; got 40"),
        ("topk_id", (4, 0), UNUSED_ID, "'topk_id'"),
        ("topk_id", (4, slice(0, 2)), 7, "every top-k id once; got 1 positions"),
        ("topk_logprob", (4, 0), 0.5, "topk_logprob of at most 0; got 1"),
        ("topk_logprob", (4, 0), np.nan, "topk_logprob of at most 0; got 1"),
        ("topk_count", (4,), 0, "'topk_count'"),
        ("tail_logprob", (4,), 0.5, "tail_logprob of at most 0; got 1"),
        ("sampled_logprob", (4,), 0.5, "sampled_logprob of at most 0; got 1"),
        ("extra_id", (4, 0), VOCAB, "extra_id below 40; got 40"),
        ("extra_id", (4, 0), UNUSED_ID, "'extra_logprob'"),
        ("extra_logprob", (4, 0), 0.5, "extra_logprob of at most 0; got 1"),
        ("extra_behaviour_logprob", (4, 0), -20, "probability within the tail; got 1"),
        ("extra_behaviour_logprob", (4, 0), np.nan, "probability within the tail; got 1"),
    ],
)
def test_a_number_out_of_range_is_found(
    name: str, at: tuple[Any, ...], value: float, named: str
) -> None:
    identity = make_identity(mass=0.7, extra=3, extra_kind="tail")
    arrays = arrays_of(identity)
    arrays[name][at] = value
    with pytest.raises(StillroomError, match=named):
        check_scores(arrays, identity, "here")


def test_entries_in_another_order_are_found() -> None:
    identity = make_identity(mass=0.7)
    arrays = arrays_of(identity)
    at = int(np.flatnonzero(arrays["topk_count"] >= 2)[0])
    for name in ("topk_id", "topk_logprob"):
        arrays[name][at, :2] = arrays[name][at, 1::-1]
    with pytest.raises(StillroomError, match="sorted by logprob, then id; got 1 that"):
        check_scores(arrays, identity, "here")


def test_a_draw_from_among_the_kept_entries_is_found() -> None:
    identity = make_identity(mass=0.7, extra=3, extra_kind="tail")
    arrays = arrays_of(identity)
    arrays["extra_id"][9, 1] = arrays["topk_id"][9, 0]
    arrays["extra_logprob"][9, 1] = arrays["topk_logprob"][9, 0]
    check_agreement(arrays, "here")
    with pytest.raises(StillroomError, match="outside the kept entries; got 1 from inside"):
        check_scores(arrays, identity, "here")


def test_some_draws_of_a_tail_but_not_all_are_found() -> None:
    identity = make_identity(mass=0.7, extra=3, extra_kind="tail")
    arrays = arrays_of(identity)
    arrays["extra_id"][9, 1] = UNUSED_ID
    arrays["extra_logprob"][9, 1] = -np.inf
    arrays["extra_behaviour_logprob"][9, 1] = np.nan
    with pytest.raises(StillroomError, match="all draws from a tail or none; got 1 positions"):
        check_scores(arrays, identity, "here")
