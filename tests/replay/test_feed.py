"""Which rows come, as the stream gives them: filters, lag, long rows, groups, and epochs' ends."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError
from stillroom.cache.schema import Arrays
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.staleness import kept_rows
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import record
from tests.replay.conftest import add_grouped_part, add_scored_part

CONFIG = StreamConfig(batch_rows=6, max_tokens=40, block_rows=4, window_rows=5, seed=3)
ROWS = 37


def stream_of(cache: Cache, rank: int = 0, world: int = 1, **changes: Any) -> ReplayStream:
    """A stream over all of a cache."""
    config = replace(CONFIG, **changes)
    return ReplayStream(Source(cache, cache.snapshot()), config, rank=rank, world=world)


def take(stream: ReplayStream, count: int) -> list[Batch]:
    """The next batches; then the stream is closed."""
    with stream:
        return [stream.next_batch() for _ in range(count)]


def epochs(stream: ReplayStream, count: int) -> list[list[Batch]]:
    """The batches of the first epochs; then the stream is closed."""
    found: list[list[Batch]] = []
    with stream:
        for batch in stream:
            if batch.epoch == count:
                return found
            if batch.epoch == len(found):
                found.append([])
            found[-1].append(batch)
    raise AssertionError("streams do not end")


def rows_in(batches: list[Batch]) -> list[int]:
    """Rows of some steps, in order."""
    return [row for batch in batches for row in batch.rows]


def real(batch: Batch) -> Iterator[MicroBatch]:
    """Micro-batches that hold something."""
    return (micro for micro in batch.micro_batches if micro is not None)


def stored(cache: Cache) -> list[Arrays]:
    """Every row of a cache, one by one."""
    commits = cache.snapshot().commits
    return [cache.read(c.part, i, i + 1) for c in commits for i in range(c.rows)]


def test_a_filter_leaves_out_what_it_says_in_every_epoch(scored_cache: Cache) -> None:
    rows = RowFilter(finish_reasons=("stop",), min_tokens=6)
    every = stored(scored_cache)
    wanted = [i for i, row in enumerate(every) if row["finish_reason"] == 1]
    wanted = [i for i in wanted if len(every[i]["token"]) >= 6]
    assert 6 <= len(wanted) < ROWS
    for batches in epochs(stream_of(scored_cache, rows=rows), 3):
        assert sorted(rows_in(batches)) == wanted
        held = [row for batch in batches for _, row, _ in record(batch).held]
        assert sorted(held) == wanted


@pytest.mark.parametrize("last_batch", ["keep", "carry"])
def test_fewer_rows_of_older_policies_come(empty_cache: Cache, last_batch: str) -> None:
    for version in range(4):
        add_scored_part(empty_cache, version, version, 15)
    policy = np.repeat(np.arange(4), 15)
    stream = stream_of(empty_cache, lag_half_life=1.0, last_batch=last_batch)
    wanted = [kept_rows(policy, 3, epoch, 1.0, np.arange(60), 3).tolist() for epoch in range(6)]
    assert len(set(map(len, wanted))) > 1, "epochs of different lengths"
    found = rows_in(take(stream, 40))
    for of_epoch in wanted:
        assert sorted(found[: len(of_epoch)]) == of_epoch
        found = found[len(of_epoch) :]


def test_lags_are_counted_from_the_snapshot_s_newest_policy(empty_cache: Cache) -> None:
    """Which the filter leaves out, as for `max_lag`."""
    add_scored_part(empty_cache, 0, 0, 40)
    add_scored_part(empty_cache, 3, 1, 5)
    policy, old = np.zeros(40, int), RowFilter(max_policy_version=0)
    with stream_of(empty_cache, lag_half_life=1.0, rows=old, batch_rows=5) as stream:
        (feed,) = stream.feeds
        sizes = [feed.units_in(epoch) for epoch in range(50)]
    assert sizes == [len(kept_rows(policy, 3, e, 1.0, np.arange(40), 3)) for e in range(50)]
    assert 4 < np.mean(sizes) < 6, "an eighth of them"


def test_a_step_larger_than_what_lags_leave_of_an_epoch_is_refused(empty_cache: Cache) -> None:
    add_scored_part(empty_cache, 0, 0, 40)
    add_scored_part(empty_cache, 3, 1, 5)
    settings: dict[str, Any] = {"lag_half_life": 1.0, "rows": RowFilter(max_policy_version=0)}
    message = r"lag_half_life: expected 6 or more rows.*; got 5, where policy 3 is the newest"
    with pytest.raises(InputError, match=message):
        stream_of(empty_cache, **settings, batch_rows=6)
    stream_of(empty_cache, **settings, batch_rows=5).close()


def test_a_cache_of_which_lags_leave_nothing_is_refused(
    empty_cache: Cache, other_cache: Cache
) -> None:
    add_scored_part(empty_cache, 0, 0, 7)
    add_scored_part(empty_cache, 3, 1, 5)
    old = RowFilter(max_policy_version=0)
    config = replace(CONFIG, lag_half_life=1.0, last_batch="carry")
    snapshot = empty_cache.snapshot()
    beside = Source(other_cache, other_cache.snapshot())
    with pytest.raises(InputError, match=r"of each cache 1; got 37, 0\.875, where policy 3"):
        ReplayStream([beside, Source(empty_cache, snapshot, rows=old)], config)
    ReplayStream([beside, Source(empty_cache, snapshot)], config).close()


def test_units_are_thinned_whole(empty_cache: Cache) -> None:
    for version in range(3):
        add_grouped_part(empty_cache, version, version, prompts=6, samples=2)
    stream = stream_of(empty_cache, lag_half_life=1.0, group_rows=2)
    sizes = set()
    for batches in epochs(stream, 4):
        rows = sorted(rows_in(batches))
        assert rows[::2] == [row - 1 for row in rows[1::2]]
        assert {row for row in rows if row >= 24} == set(range(24, 36)), "the newest all come"
        sizes.add(len(rows))
    assert max(sizes) < 36
    assert len(sizes) > 1


def test_long_rows_are_skipped_and_counted(scored_cache: Cache) -> None:
    lengths = [len(row["token"]) for row in stored(scored_cache)]
    short = [row for row, length in enumerate(lengths) if length <= 9]
    stream = stream_of(scored_cache, max_tokens=9, over_long="skip")
    (feed,) = stream.feeds
    assert feed.selection.left_out == {"over_long": ROWS - len(short)}
    for batches in epochs(stream, 2):
        assert sorted(rows_in(batches)) == short


def test_long_rows_are_truncated_and_counted(scored_cache: Cache) -> None:
    every = stored(scored_cache)
    scored = [np.flatnonzero(row["scored"]) for row in every]
    within = [s[s < 7] for s in scored]
    wanted = [row for row, s in enumerate(within) if len(s)]
    cut = [row for row in wanted if len(every[row]["token"]) > 7]
    stream = stream_of(scored_cache, max_tokens=7, over_long="truncate")
    (feed,) = stream.feeds
    assert feed.selection.truncated == len(cut) > 0
    assert feed.selection.left_out == {"no_position": ROWS - len(wanted)}
    assert ROWS - len(wanted) > 0
    (batches,) = epochs(stream, 1)
    assert sorted(rows_in(batches)) == wanted
    assert sum(b.num_positions for b in batches) == sum(len(within[row]) for row in wanted)
    for micro in (micro for batch in batches for micro in real(batch)):
        assert len(micro.token) <= 7
        for row in set(micro.row.tolist()):
            own = micro.row == row
            assert micro.sampled_id[own].tolist() == every[row]["token"][within[row]].tolist()
            for name in ("topk_id", "topk_logprob", "sampled_logprob", "behaviour_logprob"):
                values = every[row][name][: len(within[row])]
                np.testing.assert_array_equal(getattr(micro, name)[own], values)


def test_long_rows_are_refused_unless_said_otherwise(scored_cache: Cache) -> None:
    with pytest.raises(InputError, match=r"replay\.over_long to 'truncate' or 'skip'"):
        stream_of(scored_cache, max_tokens=9)


@pytest.mark.parametrize("batch_rows", [1, 5, 6, 37])
def test_a_short_batch_is_dropped(scored_cache: Cache, batch_rows: int) -> None:
    stream = stream_of(scored_cache, batch_rows=batch_rows, last_batch="drop")
    steps = stream.steps_per_epoch
    assert steps == ROWS // batch_rows
    left_out = []
    for batches in epochs(stream, 3):
        assert [len(batch.rows) for batch in batches] == [batch_rows] * steps
        rows = rows_in(batches)
        assert len(set(rows)) == len(rows)
        left_out.append(set(range(ROWS)) - set(rows))
    if ROWS % batch_rows:
        assert len(set.union(*left_out)) > ROWS % batch_rows, "others in every epoch"


def test_a_short_batch_is_filled_up_from_the_next_epoch(scored_cache: Cache) -> None:
    kept = rows_in([b for epoch in epochs(stream_of(scored_cache), 3) for b in epoch])
    carried = take(stream_of(scored_cache, last_batch="carry"), 18)
    assert {len(batch.rows) for batch in carried} == {6}
    assert rows_in(carried) == kept[: 18 * 6]


@pytest.fixture
def grouped(empty_cache: Cache) -> Cache:
    """Parts of four rollouts of each of 5 prompts, of three of each of 3, and of one."""
    add_grouped_part(empty_cache, 0, 0, prompts=5, samples=4)
    add_grouped_part(empty_cache, 0, 1, prompts=3, samples=3)
    add_grouped_part(empty_cache, 1, 2, prompts=1, samples=1)
    return empty_cache


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("last_batch", ["keep", "drop", "carry"])
@pytest.mark.parametrize("world", [1, 3])
def test_rollouts_of_a_prompt_stay_together(
    grouped: Cache, world: int, last_batch: str, share_prompts: bool
) -> None:
    settings = {"group_rows": 4, "batch_rows": 8, "last_batch": last_batch}
    prompt = np.array([int(row["prompt_id"][0]) for row in stored(grouped)])
    size = Counter(prompt.tolist())
    ranks = [
        take(stream_of(grouped, rank, world, share_prompts=share_prompts, **settings), 9)
        for rank in range(world)
    ]
    for shares in zip(*ranks, strict=True):
        counts = Counter(prompt[list(shares[0].rows)].tolist())
        assert len(counts) <= 2
        assert all(count % size[one] == 0 for one, count in counts.items())
        for share in shares:
            own = Counter(int(prompt[row]) for _, row, _ in record(share).held)
            assert all(count % size[one] == 0 for one, count in own.items())


def test_a_group_is_no_larger_than_its_setting(grouped: Cache) -> None:
    prompt = [int(row["prompt_id"][0]) for row in stored(grouped)]
    (batches,) = epochs(stream_of(grouped, group_rows=3, batch_rows=3), 1)
    sizes = Counter(len(batch.rows) for batch in batches)
    assert sizes == {3: 5 + 3, 1: 5 + 1}, "four are three and one"
    assert all(len({prompt[row] for row in batch.rows}) == 1 for batch in batches)


@pytest.mark.parametrize("max_tokens", [40, 17])
@pytest.mark.parametrize("one_row", [False, True])
def test_shared_prompts_change_no_row(grouped: Cache, max_tokens: int, one_row: bool) -> None:
    config = replace(CONFIG, group_rows=4, batch_rows=8, max_tokens=max_tokens)
    source = Source(grouped, grouped.snapshot())
    alone = take(ReplayStream(source, config, one_row=one_row), 6)
    shared = replace(config, share_prompts=True)
    together = take(ReplayStream(source, shared, one_row=one_row), 6)
    prefixes = 0
    for one, other in zip(alone, together, strict=True):
        assert (one.rows, one.num_positions) == (other.rows, other.num_positions)
        assert record(one).held == record(other).held
        tokens = [sum(len(micro.token) for micro in real(batch)) for batch in (one, other)]
        saved = 0
        for micro in real(other):
            assert len(micro.token) <= max_tokens
            for prompt in set(micro.prefix.tolist()) - {-1}:
                length = int(micro.row_start[prompt + 1] - micro.row_start[prompt])
                saved += length * (int(np.count_nonzero(micro.prefix == prompt)) - 1)
                prefixes += 1
        assert tokens[1] == tokens[0] - saved
    assert prefixes >= 6


def test_rows_in_use_at_once_are_shared_out_where_ranks_divide_lanes(scored_cache: Cache) -> None:
    config = StreamConfig(batch_rows=6, max_tokens=40, block_rows=1, window_rows=5)
    source = Source(scored_cache, scored_cache.snapshot())
    sizes = []
    for world in (1, 7, 2):
        with ReplayStream(source, config, world=world) as stream:
            sizes.append(stream.open_bytes)
    (feed,) = stream.feeds
    assert sizes[0] == sizes[2] == int(37 * feed.reader.mean_row_bytes), "all rows, at most"
    assert sizes[1] == int(7 * feed.reader.mean_row_bytes), "one of 7 lanes: 5 + 2 rows"
