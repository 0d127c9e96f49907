"""Following a growing cache on several ranks: all take up the same snapshot, and one that failed
alone takes it up later."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.commits import commit_path
from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    InputError,
    MissingError,
    StillroomError,
    StorageError,
)
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.follow import agree_alone, agree_among
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import Record, record
from tests.replay.conftest import add_scored_part, made_up_table, part_meta, score_table

CONFIG = StreamConfig(batch_rows=4, max_tokens=40, block_rows=4, window_rows=5, seed=3)
EVERY = 3


@pytest.fixture
def cache(empty_cache: Cache) -> Cache:
    """Two parts of 6 and 7 rows."""
    add_scored_part(empty_cache, 0, 0, 6)
    add_scored_part(empty_cache, 0, 1, 7)
    return empty_cache


def take(stream: ReplayStream, count: int) -> list[Record]:
    """The next batches."""
    return [record(stream.next_batch()) for _ in range(count)]


class Together:
    """Ranks of one process agree: the first that comes chooses, and the others get the same."""

    def __init__(self) -> None:
        """Nothing is chosen."""
        self.chosen: list[Any] = []

    def rank(self) -> Callable[[Callable[[], Any]], Any]:
        """What one rank agrees by."""
        count = 0

        def agree(choose: Callable[[], Any]) -> Any:
            nonlocal count
            if count == len(self.chosen):
                try:
                    self.chosen.append(choose())
                except CorruptError as error:
                    self.chosen.append(error)
            count += 1
            if isinstance(self.chosen[count - 1], Exception):
                raise self.chosen[count - 1]
            return self.chosen[count - 1]

        return agree


def ranks_of(cache: Cache, world: int, config: StreamConfig = CONFIG) -> list[ReplayStream]:
    """Streams of all ranks, in this process."""
    together = Together()
    source = Source(cache, cache.snapshot())
    config = replace(config, follow_every_steps=EVERY)
    return [
        ReplayStream(source, config, rank=rank, world=world, agree=together.rank())
        for rank in range(world)
    ]


def test_all_ranks_take_up_what_one_of_them_chose(cache: Cache) -> None:
    ranks = ranks_of(cache, 3)
    add_scored_part(cache, 1, 2, 5)
    for step in range(3 * EVERY):
        found = []
        for stream in ranks:
            found += take(stream, 1)
            if step % EVERY == 0:
                add_scored_part(cache, 1, 1000 + 100 * step + len(found), 3)
        assert len({(batch.rows, batch.num_positions, batch.epoch) for batch in found}) == 1
        assert sorted(row for b in found for _, row, _ in b.held) == sorted(found[0].rows)
        assert len({tuple(stream.snapshots) for stream in ranks}) == 1
    assert [step for step, _ in ranks[0].state_dict()["sources"][0]["history"]] == [0, 3, 6]


@pytest.mark.parametrize("kind", [MissingError, CorruptError, StorageError])
def test_a_rank_that_fails_alone_takes_up_what_the_others_did(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, kind: type[StillroomError]
) -> None:
    """Without asking them again, who have gone on."""
    first, second = ranks_of(cache, 2)
    for stream in (first, second):
        take(stream, EVERY)
    add_scored_part(cache, 1, 2, 5)
    (found,) = take(first, 1)
    add_scored_part(cache, 1, 3, 5)
    with monkeypatch.context() as patch:
        failure = kind("here", "a shard", "none", "Wait.")
        patch.setattr(Cache, "open_snapshot", lambda *_: (_ for _ in ()).throw(failure))
        for _ in range(2):
            with pytest.raises(kind):
                second.next_batch()
    (other,) = take(second, 1)
    assert second.snapshots == first.snapshots
    assert other.rows == found.rows


def test_ranks_ask_anew_where_the_snapshot_suits_none_of_them(cache: Cache) -> None:
    ranks = ranks_of(cache, 2)
    for stream in ranks:
        take(stream, EVERY)
    for part in cache.parts():
        cache.retire(part, "old")
    for stream in ranks:
        with pytest.raises(InputError, match="an empty snapshot"):
            stream.next_batch()
    add_scored_part(cache, 1, 2, 9)
    one, other = (take(stream, 1)[0] for stream in ranks)
    assert one.rows == other.rows
    assert ranks[0].snapshots == ranks[1].snapshots == [cache.snapshot().id]


def test_ranks_ask_anew_where_a_shard_lacks_a_column(cache: Cache) -> None:
    """Which is the same for all of them, and over once its part is retired."""
    config = replace(CONFIG, rows=RowFilter(ranges={"x_weight": (0, None)}))
    ranks = ranks_of(cache, 2, config)
    for stream in ranks:
        take(stream, EVERY)
    rng = np.random.default_rng(1)
    table = made_up_table(rng, 5, 1).drop_columns(["x_weight"])
    part = score_table(cache, table, part_meta(1, 2), rng)
    for stream in ranks:
        with pytest.raises(InputError, match=f"{part}.*expected a column 'x_weight'"):
            stream.next_batch()
    cache.retire(part, "no column")
    add_scored_part(cache, 1, 3, 5)
    one, other = (take(stream, 1)[0] for stream in ranks)
    assert one.rows == other.rows
    assert ranks[0].snapshots == ranks[1].snapshots == [cache.snapshot().id]


def test_a_damaged_commit_is_an_error_on_all_ranks(cache: Cache) -> None:
    ranks = ranks_of(cache, 2)
    part = add_scored_part(cache, 1, 2, 5)
    (cache.storage.folder / commit_path(part, 0)).write_bytes(b"no commit")
    for stream in ranks:
        take(stream, EVERY)
        with pytest.raises(CorruptError, match=part):
            stream.next_batch()


def test_several_ranks_need_a_way_to_agree(cache: Cache) -> None:
    source = Source(cache, cache.snapshot())
    config = replace(CONFIG, follow_every_steps=1)
    with pytest.raises(ConfigError, match="a process group of 2 ranks; got 0"):
        ReplayStream(source, config, rank=1, world=2)
    ReplayStream(source, config, rank=1, world=2, agree=agree_alone).close()
    ReplayStream(source, replace(CONFIG, follow_every_steps=0), rank=1, world=2).close()


def test_one_rank_agrees_with_itself() -> None:
    assert agree_among(1) is agree_alone
    assert agree_alone(lambda: 3) == 3


def test_a_rank_whose_storage_failed_opens_what_was_agreed_without_asking_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def agree(choose: Callable[[], Any]) -> Any:
        asked.append(choose())
        return asked[-1]

    config = replace(CONFIG, follow_every_steps=1)
    stream = ReplayStream(Source(cache, cache.snapshot()), config, agree=agree)
    stream.next_batch()
    add_scored_part(cache, 0, 2, 5)
    with monkeypatch.context() as patch:
        failure = StorageError("here", "an answer", "none", "Wait.")
        patch.setattr(Cache, "open_snapshot", lambda *_: (_ for _ in ()).throw(failure))
        for _ in range(2):
            with pytest.raises(StorageError):
                stream.next_batch()
    add_scored_part(cache, 0, 3, 5)
    batch = stream.next_batch()
    assert len(asked) == 1
    assert [stream.snapshots] == asked
    assert (batch.epoch, batch.first) == (1, 0)
    stream.close()
