"""Following a growing cache: newer commits are taken up at the next boundary, and not before."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.commits import attempt_path, commit_path
from stillroom.cache.errors import (
    CorruptError,
    InputError,
    MismatchError,
    MissingError,
)
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import OBJECT_NAME
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.follow import newest_snapshots
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import Record, record
from tests.replay.conftest import add_grouped_part, add_scored_part
from tests.replay.test_prefetch import settle

CONFIG = StreamConfig(batch_rows=4, max_tokens=40, block_rows=4, window_rows=5, seed=3)
EVERY = 3


@pytest.fixture
def cache(empty_cache: Cache) -> Cache:
    """Two parts of 6 and 7 rows."""
    add_scored_part(empty_cache, 0, 0, 6)
    add_scored_part(empty_cache, 0, 1, 7)
    return empty_cache


@pytest.fixture
def follow(cache: Cache) -> Iterator[Callable[..., ReplayStream]]:
    """Opens streams that follow the cache."""
    opened: list[ReplayStream] = []

    def make(**changes: Any) -> ReplayStream:
        config = replace(CONFIG, **{"follow_every_steps": EVERY, **changes})
        opened.append(ReplayStream(Source(cache, cache.snapshot()), config))
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


Follow = Callable[..., ReplayStream]


def take(stream: ReplayStream, count: int) -> list[Record]:
    """The next batches."""
    return [record(stream.next_batch()) for _ in range(count)]


def plain(cache: Cache, snapshot: str, **changes: Any) -> ReplayStream:
    """A stream that stays with a snapshot."""
    return ReplayStream(Source(cache, cache.open_snapshot(snapshot)), replace(CONFIG, **changes))


def history(stream: ReplayStream) -> list[list[Any]]:
    """Of the only source."""
    found: list[list[Any]] = stream.state_dict()["sources"][0]["history"]
    return found


@pytest.mark.parametrize("grown_at", [1, 2, 3])
def test_newer_commits_come_at_the_next_boundary_and_not_before(
    cache: Cache, follow: Follow, grown_at: int
) -> None:
    stream = follow()
    (old,) = stream.snapshots
    found = take(stream, grown_at)
    add_scored_part(cache, 1, 2, 5)
    found += take(stream, EVERY - grown_at)
    assert found == take(plain(cache, old), EVERY)
    assert stream.snapshots == [old]
    newer = take(stream, 4)
    new = cache.snapshot().id
    assert stream.snapshots == [new] != [old]
    assert history(stream) == [[0, old], [EVERY, new]]
    assert newer[0].first == 0
    assert newer[0].epoch == 1, "a newer snapshot begins an epoch"
    later = plain(cache, new)
    state = later.state_dict()
    state["sources"][0]["epoch"] = 1
    later.load_state_dict(state)
    assert newer == take(later, 4)


def test_an_unchanged_cache_changes_nothing(cache: Cache, follow: Follow) -> None:
    stream = follow(follow_every_steps=1)
    (only,) = stream.snapshots
    assert take(stream, 9) == take(plain(cache, only), 9)
    assert history(stream) == [[0, only]]


def test_retired_parts_leave_at_the_boundary_and_not_before(cache: Cache, follow: Follow) -> None:
    stream = follow()
    cache.retire(cache.parts()[0], "old")
    before = [row for batch in take(stream, EVERY) for row in batch.rows]
    assert len(set(before)) == 12, "all but one of 13 rows of both parts"
    after = take(stream, 2)
    assert sorted(row for batch in after for row in batch.rows) == list(range(7))


def test_an_epoch_s_end_is_a_boundary(cache: Cache, follow: Follow) -> None:
    stream = follow(follow_every_steps=-1)
    (old,) = stream.snapshots
    steps = stream.steps_per_epoch
    found = take(stream, 1)
    add_scored_part(cache, 1, 2, 5)
    found += take(stream, steps - 1)
    assert found == take(plain(cache, old), steps)
    first, *others = take(stream, 5)
    assert (first.epoch, first.first) == (1, 0)
    assert stream.snapshots == [cache.snapshot().id]
    assert sorted(row for batch in (first, *others) for row in batch.rows) == list(range(18))


def test_a_carried_epoch_s_end_is_one_too(cache: Cache, follow: Follow) -> None:
    stream = follow(follow_every_steps=-1, last_batch="carry")
    (old,) = stream.snapshots
    add_scored_part(cache, 1, 2, 5)
    found = take(stream, 4)
    assert found == take(plain(cache, old, last_batch="carry"), 4)
    assert stream.snapshots == [old], "the fourth step is filled up from the next epoch"
    (first,) = take(stream, 1)
    assert (first.epoch, first.first) == (2, 0)
    assert history(stream) == [[0, old], [4, cache.snapshot().id]]
    again = take(stream, 4)
    assert len({row for batch in (first, *again) for row in batch.rows}) == 18
    assert len(history(stream)) == 2


def test_a_state_from_before_is_followed_by_the_same_batches(cache: Cache, follow: Follow) -> None:
    stream = follow()
    states, found = [], []
    for step in range(3 * EVERY):
        if step == 1:
            add_scored_part(cache, 1, 2, 5)
        states.append(stream.state_dict())
        found += take(stream, 1)
    for step, state in enumerate(states):
        resumed = follow()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert take(resumed, 3 * EVERY - step) == found[step:], step
        assert history(resumed) == history(stream)


def test_a_stream_that_does_not_follow_needs_the_state_s_snapshot(
    cache: Cache, follow: Follow
) -> None:
    stream = follow()
    add_scored_part(cache, 1, 2, 5)
    take(stream, EVERY + 1)
    state, found = stream.state_dict(), take(stream, 2)
    (old, _), (_, new) = history(stream)[0], history(stream)[1]
    assert old == 0
    resumed = plain(cache, new)
    resumed.load_state_dict(state)
    assert take(resumed, 2) == found
    with pytest.raises(MismatchError, match="snapshot = "):
        plain(cache, history(stream)[0][1]).load_state_dict(state)


def test_a_state_of_a_snapshot_that_is_gone(cache: Cache, follow: Follow) -> None:
    stream = follow()
    state = stream.state_dict()
    add_scored_part(cache, 1, 2, 5)
    other = follow()
    before = other.state_dict()
    path = cache.storage.folder / f"snapshots/{stream.snapshots[0]}.parquet"
    path.unlink()
    with pytest.raises(MissingError, match=stream.snapshots[0]):
        other.load_state_dict(state)
    assert other.state_dict() == before, "a state that cannot be loaded changes nothing"


def test_a_state_of_another_cache_is_told_by_its_identity(
    cache: Cache, follow: Follow, tmp_path: Path
) -> None:
    identity = replace(cache.identity, topk=2)
    other = Cache.create(tmp_path / "other", identity)
    add_scored_part(other, 0, 0, 6)
    state = plain(other, other.snapshot().id).state_dict()
    with pytest.raises(MismatchError, match="identity = "):
        follow().load_state_dict(state)


def test_a_newer_snapshot_is_read_only_where_it_is_new(
    cache: Cache, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rows are chosen by: columns, and the masks of truncated rows."""
    read: list[str] = []
    read_ranges = Shard.read_ranges

    def noted(shard: Shard, wanted: Any) -> Any:
        read.append(shard.commit.part)
        return read_ranges(shard, wanted)

    monkeypatch.setattr(Shard, "read_ranges", noted)
    settings: dict[str, Any] = {
        "rows": RowFilter(max_lag=5, ranges={"x_weight": (0, None)}),
        "lag_half_life": 2.0,
        "max_tokens": 7,
        "over_long": "truncate",
        "follow_every_steps": 1,
    }
    stream = follow(**settings)
    assert set(read) == set(cache.parts())
    stream.skip(1)
    for unit in (2, 3):
        new = add_scored_part(cache, 1, unit, 9)
        cache.retire(cache.parts()[0], "old")
        read.clear()
        stream.skip(1)
        assert len(read) == 2, "its columns, and its masks"
        assert set(read) == {new}
        (feed,) = stream.feeds
        (other,) = follow(**settings).feeds
        assert feed.selection.digest == other.selection.digest
        assert set(feed._known) == {commit.digest() for commit in feed.source.snapshot.commits}


def test_a_stream_that_does_not_follow_keeps_no_columns(cache: Cache) -> None:
    with plain(cache, cache.snapshot().id, rows=RowFilter(max_lag=5)) as stream:
        assert not stream.feeds[0]._known


def test_shares_of_rows_change_with_what_is_taken_up(cache: Cache, tmp_path: Path) -> None:
    """A cache of single rows goes on as one of groups: their shares of the rows stay."""
    other = Cache.create(tmp_path / "other", cache.identity)
    add_scored_part(other, 0, 0, 20)
    config = replace(CONFIG, follow_every_steps=4, last_batch="carry", batch_rows=40, group_rows=10)
    sources = [Source(one, one.snapshot()) for one in (cache, other)]
    found, states = [], []
    with ReplayStream(sources, config) as stream:
        for step in range(16):
            if step == 4:
                add_grouped_part(cache, 0, 2, prompts=8, samples=10)
                for part in cache.parts()[:2]:
                    cache.retire(part, "old")
            states.append(stream.state_dict())
            found.append(stream.next_batch())
    counts = [batch.caches.count(0) for batch in found]
    assert counts[:4] == [2] * 4
    rows = [len(batch.rows) for batch in found[8:]]
    assert abs(sum(counts[8:]) - sum(rows) / 2) <= 10
    for step in (3, 7, 10):
        with ReplayStream(sources, config) as resumed:
            resumed.load_state_dict(states[step])
            again = [resumed.next_batch() for _ in range(2)]
        assert [b.rows for b in again] == [b.rows for b in found[step : step + 2]]


def test_what_is_not_replayed_is_said_again_where_it_changes(cache: Cache) -> None:
    said: list[str] = []
    config = replace(CONFIG, follow_every_steps=1, max_tokens=9, over_long="skip")
    with ReplayStream(Source(cache, cache.snapshot()), config, say=said.append) as stream:
        assert said == [stream.missing]
        stream.skip(2)
        assert len(said) == 1, "nothing is new"
        add_scored_part(cache, 1, 2, 9)
        stream.skip(1)
        assert said == [said[0], stream.missing]
        counts = [stream.feeds[0].selection.left_out["over_long"]]
        assert said[1] == f"rows left out: {counts[0]} by over_long"
        assert said[0] != said[1]
        short = add_short_part(cache)
        for part in cache.parts():
            if part != short:
                cache.retire(part, "old")
        stream.skip(1)
        assert said[2:] == ["every row is replayed now"]
        assert stream.missing == ""


def add_short_part(cache: Cache) -> str:
    """A part whose rows all fit."""
    for unit in range(10, 1000):
        name = add_scored_part(cache, 1, unit, 4)
        if cache.commit_of(name).row_lengths()[:, 0].max() <= 9:
            return name
        cache.retire(name, "long")
    raise AssertionError("no such part")


def test_what_is_not_replayed_of_several_caches_is_said_by_name(
    cache: Cache, other_cache: Cache
) -> None:
    said: list[str] = []
    config = replace(CONFIG, last_batch="carry")
    few = RowFilter(min_tokens=9)
    sources = [Source(cache, cache.snapshot()), Source(other_cache, other_cache.snapshot(), 1, few)]
    with ReplayStream(sources, config, say=said.append) as stream:
        count = stream.feeds[1].selection.left_out["min_tokens"]
    assert said == [f"{other_cache.storage.root}: rows left out: {count} by min_tokens"]


def test_a_state_s_snapshot_below_the_batch_is_refused(cache: Cache, follow: Follow) -> None:
    small = follow()
    state = small.state_dict()
    add_scored_part(cache, 1, 2, 20)
    large = follow(batch_rows=20)
    with pytest.raises(InputError, match="at most the 13 rows; got 20"):
        large.load_state_dict(state)


@pytest.mark.parametrize("left", [0, 1])
def test_a_cache_that_shrank_too_far_is_an_error_until_it_grows(
    cache: Cache, follow: Follow, left: int
) -> None:
    add_scored_part(cache, 0, 2, 3)
    stream = follow()
    for part in cache.parts()[: 3 - left]:
        cache.retire(part, "old")
    take(stream, EVERY)
    state = stream.state_dict()
    message = "at most the 3 rows; got 4" if left else "rows to replay; got an empty snapshot"
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            stream.next_batch()
        assert stream.state_dict() == state, "the stream stays where it was"
    add_scored_part(cache, 1, 3, 9)
    assert take(stream, 1)[0].epoch == 1
    assert [step for step, _ in history(stream)] == [0, EVERY]


def test_a_damaged_newer_commit_is_an_error_until_it_is_restored(
    cache: Cache, follow: Follow
) -> None:
    stream = follow()
    old = take(plain(cache, stream.snapshots[0]), EVERY)
    part = add_scored_part(cache, 1, 2, 5)
    path = cache.storage.folder / commit_path(part, 0)
    data = path.read_bytes()
    path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    assert take(stream, EVERY) == old
    state = stream.state_dict()
    for _ in range(2):
        with pytest.raises(CorruptError, match=part):
            stream.next_batch()
        assert stream.state_dict() == state
    path.write_bytes(data)
    take(stream, 1)
    assert stream.snapshots == [cache.snapshot().id]


def test_a_newer_shard_that_is_gone_is_an_error(cache: Cache, follow: Follow) -> None:
    stream = follow()
    part = add_scored_part(cache, 1, 2, 5)
    attempt = cache.commit_of(part).attempt
    path = cache.storage.folder / attempt_path(part, attempt) / OBJECT_NAME
    moved = path.rename(path.with_name("elsewhere"))
    shutil.move(moved, cache.storage.folder.parent / "elsewhere")
    take(stream, EVERY)
    with pytest.raises(MissingError, match=part):
        stream.next_batch()
    shutil.move(cache.storage.folder.parent / "elsewhere", path)
    assert take(stream, 1)[0].epoch == 1


def test_a_state_remembers_the_newest_snapshots(cache: Cache, follow: Follow) -> None:
    stream = follow(follow_every_steps=1)
    for unit in range(10):
        take(stream, 1)
        add_scored_part(cache, 1, 10 + unit, 2)
    take(stream, 1)
    assert [step for step, _ in history(stream)] == list(range(3, 11))
    resumed = follow(follow_every_steps=1)
    state = stream.state_dict()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


def test_the_newest_snapshot_is_of_all_that_is_scored_and_not_retired(cache: Cache) -> None:
    cache.retire(cache.parts()[0], "old")
    (found,) = newest_snapshots([cache])
    assert [commit.part for commit in cache.open_snapshot(found).commits] == cache.parts()[1:]


def test_only_the_cache_that_grew_begins_an_epoch(cache: Cache, other_cache: Cache) -> None:
    config = replace(CONFIG, follow_every_steps=EVERY, last_batch="carry", batch_rows=6)
    sources = [Source(cache, cache.snapshot()), Source(other_cache, other_cache.snapshot())]
    stream = ReplayStream(sources, config)
    take(stream, 1)
    add_scored_part(cache, 1, 2, 5)
    take(stream, EVERY)
    grown, still = stream.state_dict()["sources"]
    assert (grown["epoch"], grown["first"], len(grown["history"])) == (1, 3, 2)
    assert (still["epoch"], still["first"], len(still["history"])) == (0, 12, 1)
    stream.close()


def test_what_is_read_ahead_stays_where_nothing_is_new(follow: Follow) -> None:
    stream = follow(follow_every_steps=1)
    stream.next_batch()
    assert len(stream._ahead._ahead) > 3


def test_what_was_read_for_a_snapshot_that_does_not_fit_is_not_read_again(
    cache: Cache, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = follow(rows=RowFilter(max_lag=0), follow_every_steps=1)
    stream.next_batch()
    new = add_scored_part(cache, 1, 2, 3)
    read: list[str] = []
    read_ranges = Shard.read_ranges

    def noted(shard: Shard, wanted: Any) -> Any:
        read.append(shard.commit.part)
        return read_ranges(shard, wanted)

    monkeypatch.setattr(Shard, "read_ranges", noted)
    stream._ahead.drop()
    settle(stream)
    read.clear()
    for _ in range(3):
        with pytest.raises(InputError, match="at most the 3 rows; got 4"):
            stream.next_batch()
    assert read == [new]
    add_scored_part(cache, 1, 3, 9)
    stream.next_batch()
    assert set(stream.feeds[0]._known) == {c.digest() for c in cache.snapshot().commits}


def test_a_larger_batch_after_resuming_does_not_end_a_carried_epoch(
    cache: Cache, follow: Follow
) -> None:
    settings: dict[str, Any] = {"last_batch": "carry", "follow_every_steps": -1}
    stream = follow(**settings)
    stream.next_batch()
    state = stream.state_dict()
    add_scored_part(cache, 0, 2, 5)
    resumed = ReplayStream(
        Source(cache, cache.open_snapshot(stream.snapshots[0])),
        replace(CONFIG, **settings, batch_rows=8),
    )
    resumed.load_state_dict(state)
    batch = resumed.next_batch()
    assert (batch.epoch, batch.first) == (0, 4), "the rest of the epoch comes first"
    assert resumed.next_batch().epoch == 0
    assert len(history(resumed)) == 1
    resumed.close()
