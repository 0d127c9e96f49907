"""A writer adds and retires parts while several processes read the same followed stream: they agree
on every batch, and it is what one process gets."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.snapshot import read_snapshot
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import Record, record
from tests.replay.conftest import IDENTITY, add_scored_part

pytestmark = pytest.mark.dist

SETTINGS: dict[str, Any] = {
    "batch_rows": 5,
    "max_tokens": 40,
    "block_rows": 4,
    "window_rows": 5,
    "seed": 3,
}
EVERY = 7
STEPS = 60
ADOPTIONS = 3
TIMEOUT_S = 120
HERE = Path(__file__).parent

NAMES = ("log", "epochs", "errors", "refused")
"""What a reader leaves."""
Log = list[dict[str, Any]]
"""What a rank got: by step the state before it, the snapshot, and a record of the batch."""


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A child, which is gone afterwards."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env={**os.environ, **loopback, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@dataclass(frozen=True)
class Got:
    """What came out of a run."""

    cache: Cache
    logs: list[Log]
    """Of each rank."""
    epochs: list[Log]
    """Of each rank, where it follows at the end of every epoch."""
    errors: list[list[str]]
    """What each rank saw of errors that rank 0 met."""
    refused: list[str]
    """What each rank saw of streams with seeds and forms of their own."""


def read_while_written(folder: Path, world: int) -> Got:
    """What some reader processes got while a writer process was at work."""
    cache = Cache.create(folder / "cache", IDENTITY)
    for unit in range(3):
        add_scored_part(cache, unit, unit, 6 + unit)
    snapshot, root = cache.snapshot().id, folder / "cache"
    settings = json.dumps({**SETTINGS, "follow_every_steps": EVERY})
    common = (root, snapshot, folder, settings)
    with process("follow_writer.py", root, folder / "stop") as writer:
        _wait_for_readers(common, world)
        (folder / "stop").touch()
        _, error = writer.communicate(timeout=TIMEOUT_S)
        assert writer.returncode == 0, error.decode()
    found = [pickle.loads((folder / f"rank-{r}").read_bytes()) for r in range(world)]
    return Got(cache, *([one[name] for one in found] for name in NAMES))


def _wait_for_readers(common: tuple[object, ...], world: int, rank: int = 0) -> None:
    if rank == world:
        return
    with process("follow_reader.py", *common, rank, world, STEPS, ADOPTIONS) as reader:
        _wait_for_readers(common, world, rank + 1)
        _, error = reader.communicate(timeout=TIMEOUT_S)
        assert reader.returncode == 0, error.decode()


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} readers".format
)
def got(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Got:
    """Of a run with so many readers."""
    return read_while_written(tmp_path_factory.mktemp("followed"), request.param)


def test_all_readers_agree_on_every_batch(got: Got) -> None:
    assert_all_agree(got.logs)
    assert len(got.logs[0]) >= STEPS


def assert_all_agree(logs: list[Log]) -> None:
    """Every step is of one snapshot and state, and its rows are dealt to the ranks."""
    assert len({len(log) for log in logs}) == 1
    for step, entries in enumerate(zip(*logs, strict=True)):
        batches: list[Record] = [entry["batch"] for entry in entries]
        assert len({entry["snapshot"] for entry in entries}) == 1, step
        assert all(entry["state"] == entries[0]["state"] for entry in entries), step
        assert len({(b.epoch, b.first, b.rows, b.num_positions) for b in batches}) == 1, step
        assert len({len(batch.micro_batches) for batch in batches}) == 1, step
        held = [row for batch in batches for _, row, _ in batch.held]
        assert sorted(held) == sorted(batches[0].rows), step


def test_newer_snapshots_are_taken_up_at_the_boundaries(got: Got) -> None:
    log = got.logs[0]
    changes = [
        step for step in range(1, len(log)) if log[step]["snapshot"] != log[step - 1]["snapshot"]
    ]
    assert len(changes) >= ADOPTIONS
    assert all(step % EVERY == 0 for step in changes)
    assert all(log[step]["batch"].first == 0 for step in changes)


def test_newer_snapshots_are_taken_up_at_the_ends_of_epochs(got: Got) -> None:
    assert_all_agree(got.epochs)
    changes, left = 0, read_snapshot(got.cache.storage, got.epochs[0][0]["snapshot"]).rows
    for before, after in pairwise(got.epochs[0]):
        left -= len(before["batch"].rows)
        if after["snapshot"] != before["snapshot"]:
            changes += 1
            assert left == 0, "the epoch before was read to its end"
            assert after["batch"].first == 0
        if after["batch"].first == 0:
            left = read_snapshot(got.cache.storage, after["snapshot"]).rows
    assert changes == 2


def test_parts_come_and_leave_with_their_snapshots(got: Got) -> None:
    cache, log = got.cache, got.logs[0]
    snapshots = list(dict.fromkeys(entry["snapshot"] for entry in log))
    parts = [{c.part for c in read_snapshot(cache.storage, one).commits} for one in snapshots]
    assert parts[-1] - parts[0], "new parts were read"
    assert parts[0] - parts[-1], "retired parts were left"


def test_one_process_gets_the_same_from_every_state(got: Got) -> None:
    cache, logs = got.cache, got.logs
    streams: dict[str, ReplayStream] = {}
    for step, entries in enumerate(zip(*logs, strict=True)):
        state, snapshot = entries[0]["state"], entries[0]["snapshot"]
        if state["sources"][0]["snapshot"] != snapshot:
            continue  # the step took up a newer one
        if snapshot not in streams:
            source = Source(cache, cache.open_snapshot(snapshot))
            streams[snapshot] = ReplayStream(source, StreamConfig(**SETTINGS))
        streams[snapshot].load_state_dict(state)
        alone = record(streams[snapshot].next_batch())
        assert alone.rows == entries[0]["batch"].rows, step
        held = [row for entry in entries for row in entry["batch"].held]
        assert sorted(held) == list(alone.held), step
    assert len(streams) > ADOPTIONS
    for stream in streams.values():
        stream.close()


def test_an_error_of_rank_0_is_raised_on_all_ranks(got: Got) -> None:
    damaged = "CorruptError: commits/x: expected a commit; got none. Restore it."
    strange = "RuntimeError: rank 0: RuntimeError()"
    assert got.errors == [[damaged, strange]] * len(got.logs)


def test_streams_that_ranks_open_differently_are_refused_on_all(got: Got) -> None:
    assert len(set(got.refused)) == 1
    expected, found = "one_row = False, seed = 0", "one_row = True, seed = 1"
    assert f"the stream of rank 1: expected rank 0's {expected}; got {found}" in got.refused[0]
