"""What a stream keeps in memory: blocks, batches and buffers within their bounds, and nothing once
it is closed."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache.recycler import LEAST_BYTES
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.prefetch import MOST_STEPS
from stillroom.replay.stream import ReplayStream
from tests.replay.conftest import IDENTITY, made_up_table, part_meta, score_table
from tests.replay.test_prefetch import arrays_of, open_stream, settle

LONG_ROWS = 24
LONG = StreamConfig(
    batch_rows=1,
    max_tokens=40_000,
    block_rows=1,
    window_rows=4,
    cached_bytes=3 << 20,
    ahead_bytes=3 << 20,
    threads=2,
)


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Rows of which each is so long that its arrays are recycled, and none as long as another."""
    cache, rng = Cache.create(tmp_path_factory.mktemp("long") / "cache", IDENTITY), np.random
    table = made_up_table(rng.default_rng(0), LONG_ROWS, 0)
    lengths = [6_000 + 1_200 * row for row in range(LONG_ROWS)]
    columns = {
        "completion": [np.arange(length, dtype=np.uint32) % 50 for length in lengths],
        "scored": [None] * LONG_ROWS,
        "behaviour_logprob": [None] * LONG_ROWS,
        "x_advantage": [np.zeros(length) for length in lengths],
    }
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(at, field, pa.array(values, field.type))
    score_table(cache, table, part_meta(0, 0))
    return cache


@pytest.mark.parametrize("ahead_bytes", [1, 4_000, 30_000])
def test_what_is_ready_ahead_stays_within_its_bound(scored_cache: Cache, ahead_bytes: int) -> None:
    most = 0
    with open_stream(scored_cache, ahead_bytes=ahead_bytes) as stream:
        for _ in range(25):
            stream.next_batch()
            ahead = settle(stream)
            ready = [a.nbytes for _, batch in ahead._ahead for a in arrays_of(batch.result())]
            counted = sum(coming.bytes for coming, _ in ahead._ahead)
            assert len(ahead._ahead) == 1 or counted <= ahead_bytes
            assert counted <= sum(ready) <= 1.1 * counted
            most = max(most, len(ahead._ahead))
    assert most > 3 or ahead_bytes < 30_000


@pytest.mark.parametrize("cached_bytes", [1, 1_500, 6_000])
def test_decoded_blocks_stay_within_their_bound(scored_cache: Cache, cached_bytes: int) -> None:
    with open_stream(scored_cache, cached_bytes=cached_bytes) as stream:
        for _ in range(25):
            stream.next_batch()
            ahead = settle(stream)
            assert ahead._blocks.bytes <= cached_bytes
    with open_stream(scored_cache, cached_bytes=cached_bytes) as stream:
        wanted = _wanted_at_once(stream)
        (feed,) = stream.feeds
        sizes = [feed.reader.block_bytes(block) for block in range(10)]
        assert all(in_use <= max(cached_bytes, step) for in_use, step in wanted), "or one alone"
        assert any(in_use <= cached_bytes for in_use, _ in wanted) or cached_bytes < min(sizes)


def _wanted_at_once(stream: ReplayStream) -> list[tuple[int, int]]:
    """Bytes of blocks in use after each want, and of those that were wanted."""
    blocks = stream._ahead._blocks
    seen = []
    want = blocks.want

    def watched(keys: Any) -> None:
        want(keys)
        step = sum(feed.reader.block_bytes(number) for feed, number in keys)
        seen.append((blocks._in_use, step))

    blocks.want = watched  # type: ignore[method-assign]
    for _ in range(15):
        stream.next_batch()
        settle(stream)
    return seen


@pytest.mark.parametrize("cached_bytes", [1, 1_500])
def test_however_few_blocks_fit_as_many_steps_are_ready(
    scored_cache: Cache, cached_bytes: int
) -> None:
    """Those of later steps are read as soon as earlier steps are packed."""
    ahead_bytes = 30_000
    with open_stream(scored_cache, cached_bytes=cached_bytes, ahead_bytes=ahead_bytes) as stream:
        for _ in range(8):
            stream.next_batch()
            ahead = settle(stream)
            assert len(ahead._ahead) > 3
            assert ahead._next is not None
            ready = sum(coming.bytes for coming, _ in ahead._ahead)
            assert ready + ahead._next.bytes > ahead_bytes, "or one more would be on its way"


def test_not_more_than_so_many_steps_are_ahead(scored_cache: Cache) -> None:
    with open_stream(scored_cache, batch_rows=1) as stream:
        for _ in range(3):
            stream.next_batch()
            assert len(settle(stream)._ahead) == MOST_STEPS


def test_buffers_stay_within_their_bound_over_an_epoch(long_cache: Cache) -> None:
    """Rows of ever other lengths need buffers of ever other sizes; free ones are let go."""
    limit, most, seen = LONG.cached_bytes + LONG.ahead_bytes, 0, 0
    with ReplayStream(Source(long_cache, long_cache.snapshot()), LONG) as stream:
        for _ in range(stream.steps_per_epoch):
            batch = stream.next_batch()
            seen += sum(a.nbytes for a in arrays_of(batch) if a.nbytes >= LEAST_BYTES)
            del batch
            settle(stream)
            most = max(most, stream._recycler.bytes)
    assert seen > 2 * limit, "more than would be kept without a bound"
    assert limit / 4 < most <= limit


def test_a_closed_stream_keeps_no_memory(long_cache: Cache) -> None:
    stream = ReplayStream(Source(long_cache, long_cache.snapshot()), LONG)
    batch = stream.next_batch()
    before = [array.tobytes() for array in arrays_of(batch)]
    blocks = settle(stream)._blocks
    assert blocks.bytes > 0
    assert stream._recycler.bytes > 0
    stream.close()
    assert (blocks.bytes, len(blocks._held), stream._recycler.bytes) == (0, 0, 0)
    assert [array.tobytes() for array in arrays_of(batch)] == before, "it is the caller's"
