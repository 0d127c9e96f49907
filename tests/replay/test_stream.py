"""The stream: the same rows for any world, resumable anywhere, and only verified bytes."""

import gc
import itertools
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.commits import Commit, attempt_path
from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    InputError,
    MismatchError,
    MissingError,
)
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import OBJECT_NAME
from stillroom.replay import reader as reader_module
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.plan import Plan
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from tests.replay.conftest import VOCAB_SIZE, add_scored_part

CONFIG = StreamConfig(batch_rows=6, max_tokens=40, block_rows=4, window_rows=5, seed=3)
ROWS = 37
STEPS = 7
PER_POSITION = (
    "topk_id",
    "topk_logprob",
    "tail_logprob",
    "sampled_logprob",
    "behaviour_logprob",
)


def open_stream(cache: Cache, rank: int = 0, world: int = 1, **changes: Any) -> ReplayStream:
    """A stream over all of a cache."""
    config = replace(CONFIG, **changes)
    return ReplayStream(Source(cache, cache.snapshot()), config, rank=rank, world=world)


def take(stream: ReplayStream, count: int) -> list[Batch]:
    """The next batches."""
    return list(itertools.islice(stream, count))


def row_arrays(cache: Cache) -> list[dict[str, np.ndarray]]:
    """Every row of a cache in snapshot order, cut by hand out of whole shards."""
    rows = []
    for commit in cache.snapshot().commits:
        arrays = cache.shard(commit).all_rows()
        for i in range(commit.rows):
            positions = slice(*arrays["position_start"][i : i + 2])
            tokens = slice(*arrays["sequence_start"][i : i + 2])
            row = {name: arrays[name][positions] for name in PER_POSITION}
            row |= {name: arrays[name][tokens] for name in ("token", "scored")}
            row |= {name: arrays[name][i] for name in ("policy_version_min", "source")}
            rows.append(row)
    return rows


def pieces(batch: Batch) -> Iterator[tuple[MicroBatch, slice, np.ndarray]]:
    """(micro-batch, its tokens, its positions) of every row that a rank's batch holds."""
    for micro in batch.micro_batches:
        if micro is not None:
            for start, stop in itertools.pairwise(micro.row_start.tolist()):
                inside = (micro.predict_index >= start) & (micro.predict_index < stop)
                yield micro, slice(start, stop), np.flatnonzero(inside)


def rows_held(batch: Batch) -> list[int]:
    """Snapshot numbers of the rows that a rank's batch holds."""
    return [int(micro.row[positions[0]]) for micro, _, positions in pieces(batch)]


def assert_same(one: Batch, other: Batch) -> None:
    """Equal to the bit, NaN included."""
    assert (one.epoch, one.first, one.rows) == (other.epoch, other.first, other.rows)
    assert one.num_positions == other.num_positions
    assert len(one.micro_batches) == len(other.micro_batches)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            for field in fields(MicroBatch):
                mine, theirs = getattr(a, field.name), getattr(b, field.name)
                np.testing.assert_array_equal(mine, theirs, field.name, strict=True)


def follow(stream: ReplayStream, expected: list[Batch]) -> None:
    """Take batches, which must be these."""
    for batch in expected:
        assert_same(stream.next_batch(), batch)


def test_an_epoch_holds_every_row_once_with_the_stored_values(scored_cache: Cache) -> None:
    expected = row_arrays(scored_cache)
    seen = []
    for batch in take(open_stream(scored_cache), STEPS):
        for micro, tokens, positions in pieces(batch):
            number = int(micro.row[positions[0]])
            row = expected[number]
            seen.append(number)
            assert micro.token[tokens].tolist() == row["token"].tolist()
            scored = np.flatnonzero(row["scored"])
            assert micro.sampled_id[positions].tolist() == row["token"][scored].tolist()
            assert (micro.predict_index[positions] - tokens.start).tolist() == (scored - 1).tolist()
            for name in PER_POSITION:
                np.testing.assert_array_equal(getattr(micro, name)[positions], row[name], name)
            assert set(micro.policy_version[positions]) == {row["policy_version_min"]}
            assert set(micro.source[positions]) == {row["source"]}
            assert set(micro.row[positions]) == {number}
            temperature = 0.5 if 11 <= number < 28 else 1.0
            assert set(micro.sampling_temperature[positions]) == {temperature}
    assert sorted(seen) == list(range(ROWS))


def test_an_unknown_temperature_is_not_taken_for_one(empty_cache: Cache) -> None:
    add_scored_part(empty_cache, 0, 0, 3, temperature=None)
    stream = open_stream(empty_cache, batch_rows=3)
    micro = next(m for m in stream.next_batch().micro_batches if m is not None)
    assert np.isnan(micro.sampling_temperature).all()


def test_batches_follow_the_plan_epoch_after_epoch(scored_cache: Cache) -> None:
    stream = open_stream(scored_cache)
    plan = Plan(ROWS, CONFIG.seed, CONFIG.block_rows, CONFIG.window_rows)
    assert stream.steps_per_epoch == STEPS
    batches = take(stream, 3 * STEPS)
    for number, batch in enumerate(batches):
        epoch, step = divmod(number, STEPS)
        assert (batch.epoch, batch.first) == (epoch, 6 * step)
        assert list(batch.rows) == plan.rows_of(epoch, 6 * step, 6 * step + 6)
        assert sorted(rows_held(batch)) == sorted(batch.rows)
    assert [len(batch.rows) for batch in batches[:STEPS]] == [6] * 6 + [1]
    assert batches[0].rows != batches[STEPS].rows


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_world_changes_nothing_but_who_holds_a_row(scored_cache: Cache, world: int) -> None:
    plan = Plan(ROWS, CONFIG.seed, CONFIG.block_rows, CONFIG.window_rows)
    alone = take(open_stream(scored_cache), 2 * STEPS)
    ranks = [take(open_stream(scored_cache, r, world), 2 * STEPS) for r in range(world)]
    for step, whole in enumerate(alone):
        shares = [batches[step] for batches in ranks]
        assert {share.rows for share in shares} == {whole.rows}
        assert {share.num_positions for share in shares} == {whole.num_positions}
        assert Counter(r for share in shares for r in rows_held(share)) == Counter(whole.rows)
        for rank, share in enumerate(shares):
            places = range(whole.first, min(whole.first + 6, ROWS))
            own = [plan.row(whole.epoch, g) for g in places if g % world == rank]
            assert sorted(rows_held(share)) == sorted(own)
        assert len({len(share.micro_batches) for share in shares}) == 1
        held = [m.num_positions for share in shares for m in share.micro_batches if m]
        assert sum(held) == whole.num_positions == sum(m.num_positions for m in _real(whole))


def _real(batch: Batch) -> list[MicroBatch]:
    real = [micro for micro in batch.micro_batches if micro is not None]
    assert list(batch.micro_batches[: len(real)]) == real, "empty ones come last"
    return real


@settings(max_examples=30)
@given(
    batch=st.integers(1, 37),
    block=st.integers(1, 40),
    window=st.integers(1, 40),
    world=st.integers(1, 8),
    max_tokens=st.integers(14, 100),
    seed=st.integers(0, 100),
)
def test_any_setting_gives_each_row_once_within_the_bound(
    scored_cache: Cache,
    batch: int,
    block: int,
    window: int,
    world: int,
    max_tokens: int,
    seed: int,
) -> None:
    changes = {"batch_rows": batch, "block_rows": block, "window_rows": window, "seed": seed}
    streams = [
        open_stream(scored_cache, r, world, max_tokens=max_tokens, **changes) for r in range(world)
    ]
    seen: list[int] = []
    for _ in range(streams[0].steps_per_epoch):
        shares = [stream.next_batch() for stream in streams]
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert all(len(m.token) <= max_tokens for share in shares for m in _real(share))
        assert sum(m.num_positions for s in shares for m in _real(s)) == shares[0].num_positions
        seen += [row for share in shares for row in rows_held(share)]
    assert sorted(seen) == list(range(ROWS))


def test_a_restored_stream_goes_on_identically_from_every_step(scored_cache: Cache) -> None:
    stream = open_stream(scored_cache)
    states, batches = [], []
    for _ in range(STEPS + 4):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(stream.next_batch())
    for step, state in enumerate(states):
        resumed = open_stream(scored_cache)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        follow(resumed, batches[step:])


def test_the_state_is_a_small_plain_dict(scored_cache: Cache) -> None:
    stream = open_stream(scored_cache)
    take(stream, STEPS + 2)
    snapshot = scored_cache.snapshot().id
    (feed,) = stream.feeds
    assert stream.state_dict() == {
        "format": 3,
        "seed": 3,
        "block_rows": 4,
        "window_rows": 5,
        "group_rows": 1,
        "last_batch": "keep",
        "lag_half_life": None,
        "weight_column": None,
        "step": 9,
        "drawn": 54,
        "epoch_ended": False,
        "sources": [
            {
                "identity": scored_cache.identity.digest(),
                "share": 2**32,
                "snapshot": snapshot,
                "filter": RowFilter().digest(),
                "selection": feed.selection.digest,
                "epoch": 1,
                "first": 12,
                "history": [[0, snapshot]],
            }
        ],
    }


@pytest.mark.parametrize("world", [2, 4])
def test_a_stream_resumes_on_another_number_of_ranks(scored_cache: Cache, world: int) -> None:
    stream = open_stream(scored_cache)
    for _ in range(STEPS + 2):
        state, expected = stream.state_dict(), stream.next_batch()
        shares = []
        for rank in range(world):
            resumed = open_stream(scored_cache, rank, world)
            resumed.load_state_dict(state)
            shares.append(resumed.next_batch())
        assert {share.rows for share in shares} == {expected.rows}
        assert Counter(r for s in shares for r in rows_held(s)) == Counter(expected.rows)


@pytest.mark.parametrize("batch_rows", [1, 4, 11, 37])
def test_a_stream_resumes_with_another_batch_size(scored_cache: Cache, batch_rows: int) -> None:
    stream = open_stream(scored_cache)
    order = [row for batch in take(open_stream(scored_cache), 2 * STEPS) for row in batch.rows]
    for step in range(STEPS + 2):
        resumed = open_stream(scored_cache, batch_rows=batch_rows)
        resumed.load_state_dict(stream.state_dict())
        done = len([row for batch in take(stream, 1) for row in batch.rows])
        following: list[int] = []
        while len(following) < 15:
            following += resumed.next_batch().rows
        assert following[:15] == order[:15], step
        order = order[done:]


@pytest.mark.parametrize("change", [{"seed": 4}, {"block_rows": 5}, {"window_rows": 6}])
def test_a_state_of_another_order_is_refused(scored_cache: Cache, change: dict[str, int]) -> None:
    state = open_stream(scored_cache).state_dict()
    with pytest.raises(MismatchError, match=f"{next(iter(change))} = "):
        open_stream(scored_cache, **change).load_state_dict(state)


def test_a_state_of_another_snapshot_or_format_is_refused(
    scored_cache: Cache, other_cache: Cache
) -> None:
    stream = open_stream(scored_cache)
    state = stream.state_dict()
    with pytest.raises(MismatchError, match="snapshot = "):
        open_stream(other_cache).load_state_dict(state)
    with pytest.raises(MismatchError, match="format = 4"):
        stream.load_state_dict(state | {"format": 4})
    with pytest.raises(MismatchError, match="sources = 2"):
        stream.load_state_dict(state | {"sources": state["sources"] * 2})
    for name in ("identity", "filter", "selection", "share"):
        source = {key: value for key, value in state["sources"][0].items() if key != name}
        with pytest.raises(MismatchError, match=f"{name} = None"):
            stream.load_state_dict(state | {"sources": [source]})
    assert stream.state_dict() == state, "a refused state changes nothing"


NO_COUNTS = [None, -1, [0], "0", True, 2**64, 0.5]
NO_PLACES = [(name, no) for name in ("epoch", "first", "step", "drawn") for no in NO_COUNTS]


@pytest.mark.parametrize(("name", "value"), [*NO_PLACES, ("first", 2**40)])
def test_a_state_of_no_place_is_refused(scored_cache: Cache, name: str, value: Any) -> None:
    stream = open_stream(scored_cache)
    state = stream.state_dict()
    source = state["sources"][0]
    changed = source | {name: value} if name in source else source
    with pytest.raises(CorruptError, match=r"stream state: expected a (count|place)"):
        stream.load_state_dict(state | {name: value} | {"sources": [changed]})


@pytest.mark.parametrize("history", [None, [], [[0]], [["x", "y"]], [[0, "0" * 32]], 3])
def test_a_state_of_no_history_is_refused(scored_cache: Cache, history: Any) -> None:
    stream = open_stream(scored_cache)
    state = stream.state_dict()
    state["sources"][0]["history"] = history
    with pytest.raises(CorruptError, match="history"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], {}, {"format": 3}, {"format": 3, "sources": [3]}])
def test_what_is_no_state_is_refused(scored_cache: Cache, state: Any) -> None:
    with pytest.raises((CorruptError, MismatchError), match="stream state"):
        open_stream(scored_cache).load_state_dict(state)


def test_a_step_larger_than_the_snapshot_is_refused(scored_cache: Cache) -> None:
    with pytest.raises(
        InputError, match=r"replay\.batch_rows: expected at most the 37 rows; got 38"
    ):
        open_stream(scored_cache, batch_rows=38)


def test_an_empty_snapshot_is_refused(scored_cache: Cache) -> None:
    with pytest.raises(InputError, match="an empty snapshot"):
        ReplayStream(Source(scored_cache, scored_cache.snapshot([])), CONFIG)


def test_a_row_longer_than_a_micro_batch_is_refused_at_opening(scored_cache: Cache) -> None:
    longest = max(len(row["token"]) for row in row_arrays(scored_cache))
    open_stream(scored_cache, max_tokens=longest)
    with pytest.raises(InputError, match=f"{longest} tokens; got {longest - 1}"):
        open_stream(scored_cache, max_tokens=longest - 1)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(scored_cache: Cache, rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match="rank"):
        open_stream(scored_cache, rank, world)


@pytest.mark.parametrize(
    "name", ["batch_rows", "max_tokens", "block_rows", "window_rows", "cached_bytes"]
)
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"replay.{name}: expected at least 1; got 0"):
        replace(CONFIG, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("cached_bytes", [1, 2_000, 5_000, 100_000])
@pytest.mark.parametrize("ahead_bytes", [1, 3_000, 100_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_little_memory_gives_the_same_batches(
    scored_cache: Cache, cached_bytes: int, ahead_bytes: int, threads: int
) -> None:
    bounds = {"cached_bytes": cached_bytes, "ahead_bytes": ahead_bytes, "threads": threads}
    with open_stream(scored_cache) as plenty, open_stream(scored_cache, **bounds) as little:
        for _ in range(2 * STEPS):
            assert_same(little.next_batch(), plenty.next_batch())


def test_few_shards_are_open_at_once(scored_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(open_stream(scored_cache), STEPS)
    opened: list[weakref.ref[Shard]] = []

    def open_shard(cache: Cache, commit: Commit, empty: Any) -> Shard:
        shard = Shard(cache.storage, commit, cache.identity, empty)
        opened.append(weakref.ref(shard))
        return shard

    monkeypatch.setattr(Cache, "shard", open_shard)
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    stream = open_stream(scored_cache, cached_bytes=1, ahead_bytes=1)
    follow(stream, expected)
    gc.collect()
    assert len(opened) > 3, "all three parts are read, and one of them again"
    assert sum(shard() is not None for shard in opened) <= 2
    stream.close()


def test_streams_may_use_some_parts_only(scored_cache: Cache) -> None:
    parts = scored_cache.parts()[1:]
    stream = ReplayStream(Source(scored_cache, scored_cache.snapshot(parts)), CONFIG)
    rows = [row for batch in take(stream, stream.steps_per_epoch) for row in rows_held(batch)]
    assert sorted(rows) == list(range(17 + 9))


def test_later_parts_do_not_change_a_pinned_snapshot(scored_cache: Cache, tmp_path: Path) -> None:
    cache = Cache.open(shutil.copytree(scored_cache.storage.root, tmp_path / "copy"))
    snapshot = cache.snapshot()
    before = take(ReplayStream(Source(cache, snapshot), CONFIG), STEPS)
    cache.retire(cache.parts()[0], "test")
    reopened = ReplayStream(Source(cache, cache.open_snapshot(snapshot.id)), CONFIG)
    follow(reopened, before)


@pytest.mark.parametrize("column", ["topk_code", "sampled_logprob", "token", "prompt_length"])
def test_a_flipped_byte_stops_the_stream_and_names_the_object(
    scored_cache: Cache, tmp_path: Path, column: str
) -> None:
    cache = Cache.open(shutil.copytree(scored_cache.storage.root, tmp_path / "copy"))
    commit = cache.snapshot().commits[1]
    chunk = cache.shard(commit).manifest.arrays[column].chunks[0]
    path = Path(cache.storage.root) / attempt_path(commit.part, commit.attempt) / OBJECT_NAME
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 0x10
    path.write_bytes(data)
    good = take(open_stream(scored_cache), STEPS)
    stream = open_stream(cache)
    with pytest.raises(CorruptError, match=f"{OBJECT_NAME}, {column}, chunk 0") as caught:
        follow(stream, good)
    assert str(path) in caught.value.where
    state = stream.state_dict()
    with pytest.raises(CorruptError):
        stream.next_batch()
    assert stream.state_dict() == state, "a failed step is not skipped"


def test_a_changed_manifest_or_a_lost_shard_stops_the_stream(
    scored_cache: Cache, tmp_path: Path
) -> None:
    cache = Cache.open(shutil.copytree(scored_cache.storage.root, tmp_path / "copy"))
    commits = cache.snapshot().commits
    folders = [Path(cache.storage.root) / attempt_path(c.part, c.attempt) for c in commits]
    manifest = folders[0] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"sampler", b"Sampler"))
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        take(open_stream(cache), STEPS)
    (folders[2] / OBJECT_NAME).unlink()
    stream = ReplayStream(Source(cache, cache.snapshot([commits[2].part])), CONFIG)
    with pytest.raises(MissingError, match=OBJECT_NAME):
        stream.next_batch()


def test_a_cache_of_another_vocabulary_than_the_student_is_refused(scored_cache: Cache) -> None:
    source = Source(scored_cache, scored_cache.snapshot())
    ReplayStream(source, CONFIG, vocab_size=VOCAB_SIZE)
    with pytest.raises(MismatchError, match="expected a vocabulary of 51; got 50"):
        ReplayStream(source, CONFIG, vocab_size=51)
