"""The score job where the identity cuts by mass or asks for extra ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError
from stillroom.cache.schema import UNUSED_ID, Arrays
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import (
    VOCAB,
    FakeTeacher,
    dense_scores,
    log_softmax,
    make_identity,
    make_meta,
    make_rollout,
    make_table,
    random_rollouts,
    same_bits,
)


def scored(root: Path, rows: list[dict[str, Any]] | None = None, **identity: Any) -> Arrays:
    """The columns of the one part of a new cache; random rollouts if there are no rows."""
    cache = Cache.create(root, make_identity(**identity))
    table = random_rollouts(1, 20) if rows is None else make_table(rows)
    assert cache.add_part(table, make_meta(1))
    (part,) = score(cache, FakeTeacher()).scored
    return cache.shard(cache.commit_of(part)).all_rows()


def logits_of(arrays: Arrays) -> np.ndarray:
    """(P, V) the fake's logits of each position."""
    at = np.flatnonzero(arrays["scored"])
    return np.asarray(FakeTeacher().logit_VV[arrays["token"][at - 1]])


def test_a_shard_holds_the_entries_that_cover_the_mass(tmp_path: Path) -> None:
    arrays = scored(tmp_path, mass=0.7)
    sampled = arrays["token"][arrays["scored"] == 1]
    expected = dense_scores(logits_of(arrays), sampled, 5, 0.7)
    for name in ("topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob"):
        assert same_bits(arrays[name], getattr(expected, name)), name
    assert set(arrays["topk_count"].tolist()) >= {2, 3, 4, 5}
    assert (arrays["topk_id"] == UNUSED_ID).any()


def test_student_ids_of_a_part_are_scored(tmp_path: Path) -> None:
    rows = [
        make_rollout(
            completion=[4, 5, 6],
            scored=[1, 0, 1],
            extra_id=[[7, 8], [9, 10], [39]],
            extra_behaviour_logprob=[[-1.5, None], None, None],
        ),
        make_rollout(rollout_id=8, completion=[11]),
    ]
    arrays = scored(tmp_path, rows, extra=2, extra_kind="student")
    unused = UNUSED_ID
    assert arrays["extra_id"].tolist() == [[7, 8], [39, unused], [unused, unused]]
    nan = float("nan")
    behaviour = [[-1.5, nan], [nan, nan], [nan, nan]]
    np.testing.assert_array_equal(arrays["extra_behaviour_logprob"], behaviour)
    logprob = log_softmax(logits_of(arrays))
    expected = [[logprob[0, 7], logprob[0, 8]], [logprob[1, 39], -np.inf], [-np.inf, -np.inf]]
    np.testing.assert_array_equal(arrays["extra_logprob"], np.array(expected, np.float16))


@pytest.mark.parametrize(
    ("identity", "extra_id", "reason"),
    [
        ({}, [[7], None], "more than the 0 that this cache scores"),
        ({"extra": 1, "extra_kind": "tail"}, [[7], None], "more than the 0"),
        ({"extra": 1, "extra_kind": "student"}, [[7, 8], None], "more than the 1"),
        ({"extra": 1, "extra_kind": "student"}, [[VOCAB], None], f"an id not below {VOCAB}"),
        ({"extra": 1, "extra_kind": "student"}, [[7]], "another number of lists than tokens"),
    ],
)
def test_a_part_whose_ids_the_cache_does_not_score_is_refused(
    cache: Cache, identity: dict[str, Any], extra_id: list[Any], reason: str
) -> None:
    cache.identity = make_identity(**identity)
    table = make_table([make_rollout(), make_rollout(rollout_id=8, extra_id=extra_id)])
    with pytest.raises(InputError, match=f"row 1: .*{reason}"):
        cache.add_part(table, make_meta(1))
    assert cache.parts() == []


def test_draws_are_the_same_when_a_part_is_scored_again(tmp_path: Path) -> None:
    arrays = scored(tmp_path, mass=0.6, extra=4, extra_kind="tail")
    cache = Cache.open(tmp_path)
    (part,) = cache.parts()
    cache.quarantine(part, "once more", damaged=False)
    assert score(cache, FakeTeacher()).scored == [part]
    again = cache.shard(cache.commit_of(part)).all_rows()
    for name in ("extra_id", "extra_logprob", "extra_behaviour_logprob"):
        assert same_bits(arrays[name], again[name]), name
    drawn = arrays["extra_id"]
    assert (drawn != UNUSED_ID).all()
    assert not (drawn[:, :, None] == arrays["topk_id"][:, None, :]).any()
    assert (drawn[:-1] != drawn[1:]).any(1).mean() > 0.5, "each position has draws of its own"


def test_an_empty_tail_has_no_draws(tmp_path: Path) -> None:
    arrays = scored(tmp_path, topk=VOCAB, extra=2, extra_kind="tail")
    assert (arrays["extra_id"] == UNUSED_ID).all()
    assert np.isneginf(arrays["extra_logprob"]).all()
    assert np.isnan(arrays["extra_behaviour_logprob"]).all()
