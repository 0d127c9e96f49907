"""The dataset: the stream's steps in their order, by itself and in worker processes, resumable."""

import itertools
import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    ForkedError,
    MismatchError,
    MissingError,
    StillroomError,
)
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.replay import dataset as dataset_module
from stillroom.replay.config import StreamConfig
from stillroom.replay.dataset import ReplayDataset, StoredSource
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from stillroom.replay.tensors import Step, step_tensors
from tests.replay.conftest import add_scored_part

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata

CONFIG = StreamConfig(batch_rows=6, max_tokens=40, block_rows=4, window_rows=5, seed=3, threads=2)
STEPS = 9
"""Beyond an epoch of the fixture's 37 rows."""


@pytest.fixture(scope="module", autouse=True)
def _quick_workers() -> None:
    """The server that workers are forked from has imported what they need, and done nothing."""
    multiprocessing.set_forkserver_preload(["stillroom.replay.dataset", "pytest"])


def stored(cache: Cache, **settings: Any) -> StoredSource:
    """All of a cache."""
    root = str(cache.storage.root)
    return StoredSource(root=root, snapshot=cache.snapshot().id, **settings)


def make(cache: Cache, num_steps: int | None = STEPS, **settings: Any) -> ReplayDataset:
    """A dataset over all of a cache."""
    return ReplayDataset(stored(cache), CONFIG, num_steps=num_steps, **settings)


def loader(dataset: ReplayDataset, workers: int, method: str = "forkserver") -> DataLoader[Step]:
    """A loader of steps."""
    context = method if workers else None
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )


def stateful(dataset: ReplayDataset, workers: int, **settings: Any) -> StatefulDataLoader:
    """A loader whose state can be saved."""
    context = "forkserver" if workers else None
    return StatefulDataLoader(
        dataset, None, num_workers=workers, multiprocessing_context=context, **settings
    )


def expected_steps(cache: Cache, count: int = STEPS, **settings: Any) -> list[Step]:
    """What the stream itself gives."""
    with ReplayStream(Source(cache, cache.snapshot()), CONFIG, **settings) as stream:
        return [step_tensors(batch) for batch in itertools.islice(stream, count)]


def plain(value: Any) -> Any:
    """Tensors as their dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def assert_same(found: Iterator[Step] | list[Step], expected: list[Step]) -> None:
    """Equal to the bit, NaN included, and no more of them."""
    assert plain(list(found)) == plain(expected)


def test_it_gives_the_steps_of_the_stream(scored_cache: Cache) -> None:
    expected = expected_steps(scored_cache)
    assert len({plain(step["rows"])[2] for step in expected}) == STEPS
    dataset = make(scored_cache)
    assert_same(iter(dataset), expected)
    assert_same(iter(dataset), expected)
    assert_same(iter(loader(dataset, 0)), expected)


def test_it_goes_on_without_end_where_none_is_given(scored_cache: Cache) -> None:
    steps = itertools.islice(make(scored_cache, None), 3 * STEPS)
    assert_same(list(steps), expected_steps(scored_cache, 3 * STEPS))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_its_share(scored_cache: Cache, rank: int) -> None:
    found = iter(make(scored_cache, rank=rank, world=3, one_row=True))
    expected = expected_steps(scored_cache, rank=rank, world=3, one_row=True)
    assert_same(found, expected)
    rows = [len(m["prefix"]) for step in expected for m in step["micro_batches"] if m]
    assert set(rows) == {1}


@pytest.mark.dist
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_steps_in_order(scored_cache: Cache, workers: int) -> None:
    assert_same(iter(loader(make(scored_cache), workers)), expected_steps(scored_cache))


@pytest.mark.dist
@pytest.mark.slow
def test_spawned_workers_give_the_same_steps(scored_cache: Cache) -> None:
    found = iter(loader(make(scored_cache, rank=1, world=2), 2, "spawn"))
    assert_same(found, expected_steps(scored_cache, rank=1, world=2))


def test_a_worker_reads_its_own_steps_only(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    rows = Shard.rows

    def counted(shard: Shard, start: int, stop: int, *rest: Any) -> Any:
        read.append((shard.commit.part, start))
        return rows(shard, start, stop, *rest)

    monkeypatch.setattr(Shard, "rows", counted)
    source = Source(scored_cache, scored_cache.snapshot())
    config = replace(CONFIG, batch_rows=1, block_rows=1, cached_bytes=1, last_batch="drop")
    with ReplayStream(source, config, stride=10) as stream:
        for _ in range(3):
            stream.next_batch()
    assert 3 <= len(read) <= 5


def test_it_resumes_at_every_step(scored_cache: Cache) -> None:
    dataset, expected = make(scored_cache), expected_steps(scored_cache)
    states = [dataset.state_dict()]
    for _ in dataset:
        states.append(dataset.state_dict())
    assert [state["step"] for state in states] == list(range(STEPS + 1))
    for number, state in enumerate(states):
        resumed = make(scored_cache)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        steps = iter(resumed)
        assert resumed.state_dict()["step"] == number
        assert_same(steps, expected[number:])


def test_it_skips_without_reading(scored_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_steps(scored_cache)
    for first in (0, 1, 5, STEPS):
        dataset = make(scored_cache)
        dataset.skip(first)
        assert_same(iter(dataset), expected[first:])
    dataset.load_state_dict(make(scored_cache).state_dict())
    dataset.skip(2)
    dataset.skip(4)

    def refuse(*_: Any) -> None:
        raise AssertionError("a row is read")

    monkeypatch.setattr(Shard, "rows", refuse)
    iter(dataset)
    assert dataset.state_dict()["step"] == 6


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.dist)])
def test_arrays_are_pinned_where_no_worker_sends_them(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """There is no page-locked memory here, so what would ask for it is only counted."""
    asked: list[Any] = []

    def counted(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        asked.append(shape)
        return np.empty(shape, dtype)

    monkeypatch.setattr(dataset_module, "pinned_empty", counted)
    expected = expected_steps(scored_cache)
    assert_same(iter(loader(make(scored_cache, pin=True), workers)), expected)
    assert bool(asked) == (not workers)
    asked.clear()
    assert_same(iter(loader(make(scored_cache), workers)), expected)
    assert not asked


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.dist)])
def test_a_place_to_begin_is_used_up(scored_cache: Cache, workers: int) -> None:
    """By one iteration, also in a worker that stays; the next ones begin at the beginning."""
    expected, dataset = expected_steps(scored_cache), make(scored_cache)
    dataset.skip(4)
    context = "forkserver" if workers else None
    steps = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=bool(workers),
    )
    for first in (4, 0, 0):
        assert_same(iter(steps), expected[first:])
    if not workers:
        state = make(scored_cache)
        state.skip(3)
        dataset.load_state_dict(state.state_dict())
        assert dataset.state_dict()["step"] == 3
        for first in (3, 0):
            assert_same(iter(dataset), expected[first:])


@pytest.mark.dist
def test_a_state_without_workers_is_good_for_any_number_of_them(scored_cache: Cache) -> None:
    alone, expected = make(scored_cache), expected_steps(scored_cache)
    list(itertools.islice(alone, 3))
    dataset = make(scored_cache)
    dataset.load_state_dict(alone.state_dict())
    dataset.skip(1)
    assert_same(iter(loader(dataset, 2)), expected[4:])


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stateful_loader_resumes_in_mid_epoch(scored_cache: Cache, workers: int) -> None:
    expected = expected_steps(scored_cache)
    first = stateful(make(scored_cache), workers)
    steps = iter(first)
    taken = [next(steps) for _ in range(3)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert_same([*taken, *steps], expected)
    second = stateful(make(scored_cache), workers)
    second.load_state_dict(state)
    assert_same(iter(second), expected[3:])
    assert_same(iter(second), expected)


@pytest.mark.dist
def test_a_stateful_loader_may_save_less_often(scored_cache: Cache) -> None:
    expected = expected_steps(scored_cache)
    first = stateful(make(scored_cache), 2, snapshot_every_n_steps=2)
    steps = iter(first)
    for _ in range(5):
        next(steps)
    second = stateful(make(scored_cache), 2, snapshot_every_n_steps=2)
    second.load_state_dict(first.state_dict())
    assert_same(iter(second), expected[5:])


@pytest.mark.dist
def test_another_number_of_workers_is_refused(scored_cache: Cache) -> None:
    first = stateful(make(scored_cache), 2)
    next(iter(first))
    second = stateful(make(scored_cache), 1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="Resume with 2 workers, or skip"):
        next(iter(second))


def test_a_workers_state_is_not_taken_for_that_of_all(scored_cache: Cache) -> None:
    dataset = make(scored_cache)
    state = dataset.state_dict() | {"worker": 1, "workers": 2, "step": 1, "ahead": 1}
    dataset.load_state_dict(state)
    with pytest.raises(MismatchError, match="worker 0 of 1; got that of worker 1 of 2"):
        iter(dataset)
    with pytest.raises(ConfigError, match="a state of 2 workers"):
        dataset.skip(1)


@pytest.mark.dist
@pytest.mark.parametrize("load", [loader, stateful])
def test_a_forked_worker_is_refused_at_once(scored_cache: Cache, load: Any) -> None:
    dataset = make(scored_cache)
    forked = load(dataset, 0)
    forked.num_workers, forked.prefetch_factor = 1, 2
    forked.multiprocessing_context = "fork"
    with pytest.raises(RuntimeError, match="multiprocessing_context='spawn'"):
        next(iter(forked))


def test_a_forked_child_is_refused(scored_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(scored_cache)
    sent = pickle.dumps(dataset)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ForkedError, match="a forked child"):
        iter(dataset)
    iter(pickle.loads(sent))


def test_nothing_that_is_open_is_sent_to_a_worker(scored_cache: Cache) -> None:
    dataset, expected = make(scored_cache), expected_steps(scored_cache)
    steps = iter(dataset)
    next(steps)
    assert_same(iter(pickle.loads(pickle.dumps(dataset))), expected)
    assert_same(steps, expected[1:])


@pytest.mark.dist
def test_a_worker_cannot_follow_a_cache(scored_cache: Cache) -> None:
    config = replace(CONFIG, follow_every_steps=2)
    dataset = ReplayDataset(stored(scored_cache), config, num_steps=STEPS)
    with pytest.raises(RuntimeError, match="follow_every_steps: expected 0 in a DataLoader worker"):
        next(iter(loader(dataset, 1)))
    assert len(list(dataset)) == STEPS


@pytest.mark.dist
def test_errors_of_a_worker_reach_the_trainer(scored_cache: Cache) -> None:
    source = StoredSource(root=str(scored_cache.storage.root), snapshot="0" * 32)
    dataset = ReplayDataset(source, CONFIG)
    with pytest.raises(MissingError, match="0" * 32):
        iter(dataset)
    with pytest.raises(RuntimeError, match="0" * 32):
        next(iter(loader(dataset, 1)))


def test_several_caches_are_mixed(scored_cache: Cache, other_cache: Cache) -> None:
    config = replace(CONFIG, last_batch="carry")
    rows = RowFilter(sources=("student",))
    given = [stored(scored_cache, weight=2.0), stored(other_cache, rows=rows)]
    found = list(ReplayDataset(given, config, num_steps=STEPS))
    sources = [
        Source(scored_cache, scored_cache.snapshot(), 2.0),
        Source(other_cache, other_cache.snapshot(), 1.0, rows),
    ]
    with ReplayStream(sources, config) as stream:
        assert_same(found, [step_tensors(b) for b in itertools.islice(stream, STEPS)])
    caches = np.concatenate([step["caches"].numpy() for step in found])
    assert np.bincount(caches).tolist() == [36, 18]


@pytest.fixture
def growing(empty_cache: Cache) -> Cache:
    """A part of 20 rows."""
    add_scored_part(empty_cache, 0, 0, 20)
    return empty_cache


def test_a_following_dataset_resumes_where_its_first_snapshot_is_gone(growing: Cache) -> None:
    config = replace(CONFIG, follow_every_steps=2)
    source = stored(growing)
    dataset = ReplayDataset(source, config, num_steps=8)
    assert dataset.snapshots == [source.snapshot]
    steps = iter(dataset)
    next(steps)
    add_scored_part(growing, 1, 1, 9)
    for _ in range(2):
        next(steps)
    newest = growing.snapshot().id
    assert dataset.snapshots == [newest] != [source.snapshot]
    state, expected = dataset.state_dict(), list(steps)
    assert growing.storage.folder is not None
    (growing.storage.folder / f"snapshots/{source.snapshot}.parquet").unlink()
    resumed = ReplayDataset(source, config, num_steps=8)
    resumed.load_state_dict(state)
    assert resumed.snapshots == [newest]
    assert_same(iter(resumed), expected)
    assert resumed.snapshots == [newest]


def test_a_state_of_other_sources_is_told_apart_where_they_are_followed(growing: Cache) -> None:
    config = replace(CONFIG, follow_every_steps=2, last_batch="carry")
    one = ReplayDataset(stored(growing), config)
    iter(one)
    two = ReplayDataset([stored(growing), stored(growing)], config)
    two.load_state_dict(one.state_dict())
    with pytest.raises(MismatchError, match="expected sources = 2; got sources = 1"):
        iter(two)


def test_a_state_of_another_cache_is_told_apart_where_they_are_followed(
    growing: Cache, other_cache: Cache, tmp_path: Path
) -> None:
    """By the teacher that scored it; where that is the same, by the snapshot."""
    other = Cache.create(tmp_path / "other", replace(growing.identity, topk=2))
    add_scored_part(other, 0, 0, 20)
    config = replace(CONFIG, follow_every_steps=2)
    theirs = ReplayDataset(stored(growing), config)
    iter(theirs)
    mine = ReplayDataset(stored(other), config)
    mine.load_state_dict(theirs.state_dict())
    with pytest.raises(MismatchError, match="stream state: expected identity = "):
        iter(mine)
    mine = ReplayDataset(stored(other_cache), config)
    mine.load_state_dict(theirs.state_dict())
    message = f"{growing.snapshot().id}.*resume with the caches of the run that saved the state"
    with pytest.raises(MissingError, match=message):
        iter(mine)


@pytest.mark.parametrize("over_long", ["skip", "truncate"])
def test_what_is_not_replayed_is_said(
    growing: Cache, over_long: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, max_tokens=9, over_long=over_long, follow_every_steps=1)
    dataset = ReplayDataset(stored(growing), config)
    assert dataset.missing == ""
    steps = iter(dataset)
    assert re.search("by over_long$" if over_long == "skip" else "truncated$", dataset.missing)
    said = [f"  replay: {dataset.missing}\n"]
    next(steps)
    add_scored_part(growing, 1, 1, 30)
    next(steps)
    said.append(f"  replay: {dataset.missing}\n")
    assert capfd.readouterr().err == "".join(said)
    iter(ReplayDataset(stored(growing), replace(config, follow_every_steps=0), rank=1, world=2))
    assert capfd.readouterr().err == "", "rank 0 said it"


def test_what_is_not_replayed_is_said_by_one_worker(
    growing: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers write to the stream that their server began with: here they are of this process."""
    config = replace(CONFIG, max_tokens=9, over_long="skip")
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(dataset_module, "get_worker_info", lambda info=info: info)
        next(iter(ReplayDataset(stored(growing), config, num_steps=4)))
        assert capsys.readouterr().err.count(" by over_long\n") == (worker == 0)


def test_workers_share_memory_and_threads(scored_cache: Cache) -> None:
    config = replace(CONFIG, cached_bytes=1000, ahead_bytes=101, threads=8)
    shared = dataset_module._share(config, 4, remote=False)
    assert (shared.cached_bytes, shared.ahead_bytes, shared.threads) == (250, 25, 2)
    assert dataset_module._share(replace(config, threads=0), 64, remote=True).threads == 1
    assert dataset_module._share(config, 1, remote=False) == config


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": 2}, MismatchError),
        ({"format": None}, MismatchError),
        ({"step": -1}, CorruptError),
        ({"step": "1"}, CorruptError),
        ({"ahead": True}, CorruptError),
        ({"worker": 1}, CorruptError),
        ({"workers": 0}, CorruptError),
        ({"stream": []}, CorruptError),
        ({"more": 1}, CorruptError),
    ],
)
def test_a_state_that_is_none_is_refused(
    scored_cache: Cache, change: dict[str, Any], error: type[StillroomError]
) -> None:
    dataset = make(scored_cache)
    with pytest.raises(error, match="dataset state"):
        dataset.load_state_dict(dataset.state_dict() | change)
    assert_same(itertools.islice(dataset, 2), expected_steps(scored_cache, 2))


@pytest.mark.parametrize("state", [None, 3, []])
def test_what_is_no_mapping_is_no_state(scored_cache: Cache, state: Any) -> None:
    with pytest.raises(CorruptError, match="dataset state: expected a mapping; got"):
        make(scored_cache).load_state_dict(state)


def test_a_student_of_another_vocabulary_is_refused(scored_cache: Cache) -> None:
    size = scored_cache.identity.vocab_size
    next(iter(make(scored_cache, vocab_size=size)))
    with pytest.raises(MismatchError, match=f"vocabulary of {size + 1}; got {size}"):
        iter(make(scored_cache, vocab_size=size + 1))


def test_the_state_of_another_cache_is_refused(scored_cache: Cache, other_cache: Cache) -> None:
    theirs = make(other_cache)
    next(iter(theirs))
    mine = make(scored_cache)
    mine.load_state_dict(theirs.state_dict())
    with pytest.raises(MismatchError, match=re.escape(scored_cache.snapshot().id)):
        iter(mine)


def test_impossible_arguments_are_refused(scored_cache: Cache) -> None:
    with pytest.raises(ConfigError, match="num_steps"):
        make(scored_cache, -1)
    with pytest.raises(ConfigError, match="rank"):
        iter(make(scored_cache, rank=2, world=2))
