"""The state: small, plain, and refused wherever it does not belong."""

import json
from dataclasses import replace
from typing import Any

import pytest

from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.state import HISTORY, snapshots_in
from stillroom.replay.stream import ReplayStream

CONFIG = StreamConfig(
    batch_rows=6, max_tokens=40, block_rows=4, window_rows=5, seed=3, last_batch="carry"
)
ORDER: dict[str, Any] = {
    "seed": 4,
    "block_rows": 5,
    "window_rows": 6,
    "group_rows": 2,
    "last_batch": "drop",
    "lag_half_life": 1.5,
    "weight_column": "x_weight",
}
FREE: dict[str, Any] = {
    "batch_rows": 9,
    "max_tokens": 50,
    "threads": 1,
    "cached_bytes": 1,
    "ahead_bytes": 1,
    "follow_every_steps": 2,
    "over_long": "skip",
}


def stream_of(*sources: Source, **changes: Any) -> ReplayStream:
    """A stream over some caches."""
    return ReplayStream(sources, replace(CONFIG, **changes))


def whole(cache: Cache, **settings: Any) -> Source:
    """All of a cache."""
    return Source(cache, cache.snapshot(), **settings)


def plain_types(value: Any) -> set[type]:
    """Of all that a value is made of."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {type(value)}.union(*map(plain_types, inner))


def test_a_state_is_plain_and_small(scored_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache), lag_half_life=2.0)
    stream.next_batch()
    state = stream.state_dict()
    assert plain_types(state) <= {dict, list, str, int, float, bool, type(None)}
    assert len(json.dumps(state)) < 600
    stream.close()


def test_a_state_is_a_copy(scored_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache))
    state = stream.state_dict()
    stream.load_state_dict(state)
    state["sources"][0]["history"].append([5, "x"])
    state["sources"][0]["first"] = 3
    found = stream.state_dict()["sources"][0]
    assert (found["first"], len(found["history"])) == (0, 1)


@pytest.mark.parametrize("name", ORDER)
def test_what_the_order_hangs_on_is_named(scored_cache: Cache, name: str) -> None:
    state = stream_of(whole(scored_cache)).state_dict()
    with pytest.raises(MismatchError, match=f"expected {name} = {ORDER[name]!r}; got {name} = "):
        stream_of(whole(scored_cache), **{name: ORDER[name]}).load_state_dict(state)


@pytest.mark.parametrize("name", FREE)
def test_what_it_does_not_hang_on_may_change(scored_cache: Cache, name: str) -> None:
    stream = stream_of(whole(scored_cache))
    stream.skip(2)
    other = stream_of(whole(scored_cache), **{name: FREE[name]})
    other.load_state_dict(stream.state_dict())
    assert other.state_dict() == stream.state_dict()


def test_other_rows_are_refused(scored_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache))
    cut = stream_of(whole(scored_cache), max_tokens=10, over_long="truncate")
    with pytest.raises(MismatchError, match="expected selection = "):
        cut.load_state_dict(stream.state_dict())
    few = stream_of(whole(scored_cache, rows=RowFilter(sources=("student",))))
    with pytest.raises(MismatchError, match="expected filter = "):
        stream.load_state_dict(few.state_dict())


@pytest.mark.parametrize("follow", [0, 3])
def test_another_number_of_caches_is_refused(
    scored_cache: Cache, other_cache: Cache, follow: int
) -> None:
    one = stream_of(whole(scored_cache), follow_every_steps=follow)
    two = stream_of(whole(scored_cache), whole(other_cache), follow_every_steps=follow)
    with pytest.raises(MismatchError, match="expected sources = 2; got sources = 1"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(MismatchError, match="expected sources = 1; got sources = 2"):
        one.load_state_dict(two.state_dict())
    with pytest.raises(MismatchError, match="got sources = 0"):
        one.load_state_dict({**one.state_dict(), "sources": []})


@pytest.mark.parametrize("follow", [0, 3])
@pytest.mark.parametrize("snapshot", [None, 3, "", "../cache", "0" * 32, "z" * 32])
def test_a_state_of_no_snapshot_is_refused(scored_cache: Cache, follow: int, snapshot: Any) -> None:
    stream = stream_of(whole(scored_cache), follow_every_steps=follow)
    state = stream.state_dict()
    state["sources"][0]["snapshot"] = snapshot
    before = stream.state_dict()
    with pytest.raises((CorruptError, MismatchError, MissingError), match=r"snapshot|state_dict"):
        stream.load_state_dict(state)
    assert stream.state_dict() == before


def test_a_place_behind_the_epoch_s_end_is_refused(scored_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache))
    state = stream.state_dict()
    state["sources"][0]["first"] = 36
    stream.load_state_dict(state)
    assert len(stream.next_batch().rows) == 6, "a row of this epoch, five of the next"
    state["sources"][0]["first"] = 37
    with pytest.raises(CorruptError, match="a place below 37 in epoch 0; got 37"):
        stream.load_state_dict(state)
    stream.close()


def test_the_snapshots_of_a_state(scored_cache: Cache, other_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache), whole(other_cache))
    assert snapshots_in(stream.state_dict()) == stream.snapshots
    with pytest.raises(CorruptError, match="no usable 'sources'"):
        snapshots_in({})


def test_a_history_grows_no_further(scored_cache: Cache) -> None:
    stream = stream_of(whole(scored_cache))
    state = stream.state_dict()
    (snapshot,) = stream.snapshots
    state["sources"][0]["history"] = [[step, snapshot] for step in range(20)]
    stream.load_state_dict(state)
    found = stream.state_dict()["sources"][0]["history"]
    assert [step for step, _ in found] == list(range(20 - HISTORY, 20))
