"""What a stream that follows its cache lets go of: snapshots that were left, and all when it is
closed."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from tests.replay.conftest import add_scored_part
from tests.replay.test_prefetch import settle


@pytest.fixture
def cache(empty_cache: Cache) -> Cache:
    """Two parts of 6 and 7 rows."""
    add_scored_part(empty_cache, 0, 0, 6)
    add_scored_part(empty_cache, 0, 1, 7)
    return empty_cache


def following(cache: Cache, **changes: Any) -> ReplayStream:
    """A stream of small steps that follows the cache."""
    settings = {"batch_rows": 4, "block_rows": 4, "follow_every_steps": 3, **changes}
    return ReplayStream(Source(cache, cache.snapshot()), StreamConfig(max_tokens=40, **settings))


def test_snapshots_that_were_left_are_forgotten(cache: Cache) -> None:
    stream = following(cache, follow_every_steps=1)
    feeds = []
    for unit in range(2, 8):
        stream.next_batch()
        feeds.append(weakref.ref(stream.feeds[0]))
        add_scored_part(cache, 0, unit, 5)
    stream.next_batch()
    gc.collect()
    assert sum(feed() is not None for feed in feeds) <= 1
    assert {feed for feed, _ in stream._ahead._blocks._held} == set(stream.feeds)
    stream.close()


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Only what nobody refers to is let go of."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_a_feed_that_was_left_is_let_go_of_at_once(cache: Cache) -> None:
    stream = following(cache, follow_every_steps=1, lag_half_life=2.0)
    stream.next_batch()
    settle(stream)
    left = weakref.ref(stream.feeds[0])
    add_scored_part(cache, 0, 5, 5)
    stream.next_batch()
    assert left() is None
    read = weakref.ref(stream.feeds[0])
    stream.close()
    del stream
    assert read() is None


def test_a_closed_stream_keeps_no_shard(cache: Cache) -> None:
    stream = following(cache, rows=RowFilter(ranges={"x_weight": (0, None)}))
    stream.next_batch()
    settle(stream)
    (feed,) = stream.feeds
    assert feed.reader._shard.cache_info().currsize
    assert feed._known
    stream.close()
    assert not feed.reader._shard.cache_info().currsize
    assert not feed._known
