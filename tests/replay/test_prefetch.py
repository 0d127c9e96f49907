"""Reading ahead: bounded, errors in the caller's thread, and threads that end."""

import copy
import gc
import pickle
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, CorruptError
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import OBJECT_NAME
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.prefetch import MOST_STEPS, Prefetch
from stillroom.replay.reader import Block, RowReader
from stillroom.replay.step import Position, Step
from stillroom.replay.stream import ReplayStream

CONFIG = StreamConfig(batch_rows=5, max_tokens=40, block_rows=4, window_rows=5, threads=2)
WAIT_S = 60
"""For what comes at once unless something is broken."""


def open_stream(
    cache: Cache, empty: Callable[..., np.ndarray] = np.empty, **changes: Any
) -> ReplayStream:
    """A stream over all of a cache."""
    config = replace(CONFIG, **changes)
    return ReplayStream(Source(cache, cache.snapshot()), config, empty=empty)


def settle(stream: ReplayStream) -> Prefetch:
    """Wait until all steps on their way are ready."""
    ahead = stream._ahead
    ahead.settle()
    assert not wait([batch for _, batch in ahead._ahead], WAIT_S).not_done
    return ahead


def arrays_of(batch: Batch) -> list[np.ndarray]:
    """All arrays of a batch."""
    micro = [micro for micro in batch.micro_batches if micro is not None]
    return [getattr(one, field.name) for one in micro for field in fields(MicroBatch)]


def own_threads() -> set[threading.Thread]:
    """Threads of streams."""
    return {t for t in threading.enumerate() if t.name.startswith("stillroom-")}


def same(one: Batch, other: Batch) -> bool:
    """Whether batches are equal to the bit."""
    mine, theirs = arrays_of(one), arrays_of(other)
    return one.rows == other.rows and [a.tobytes() for a in mine] == [a.tobytes() for a in theirs]


@pytest.fixture
def copied(scored_cache: Cache, tmp_path: Path) -> Cache:
    """A cache to be damaged."""
    return Cache.open(shutil.copytree(scored_cache.storage.root, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    gc.collect()
    before = own_threads()
    yield
    gc.collect()
    for thread in own_threads() - before:
        thread.join(WAIT_S)
    assert own_threads() <= before


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
        assert max(wanted) <= max(cached_bytes, sum(sizes))
        assert any(own <= cached_bytes for own in wanted) or cached_bytes < min(sizes)


def _wanted_at_once(stream: ReplayStream) -> list[int]:
    """Bytes of blocks in use after each want."""
    blocks = stream._ahead._blocks
    seen = []
    want = blocks.want

    def watched(keys: Any) -> None:
        fits = blocks.fits(keys)
        want(keys)
        step = sum(feed.reader.block_bytes(number) for feed, number in keys)
        assert fits or blocks._in_use == step, "more than the limit only for one step alone"
        seen.append(blocks._in_use)

    blocks.want = watched  # type: ignore[method-assign]
    for _ in range(15):
        stream.next_batch()
        settle(stream)
    return seen


def test_not_more_than_so_many_steps_are_ahead(scored_cache: Cache) -> None:
    with open_stream(scored_cache, batch_rows=1) as stream:
        for _ in range(3):
            stream.next_batch()
            stream._ahead.settle()
            assert len(stream._ahead._ahead) == MOST_STEPS


def test_nothing_runs_before_the_first_batch_is_wanted(scored_cache: Cache) -> None:
    before = own_threads()
    stream = open_stream(scored_cache)
    stream.skip(3)
    stream.load_state_dict(stream.state_dict())
    assert own_threads() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_after_an_error_the_stream_stays_and_goes_on_when_the_file_is_back(
    scored_cache: Cache, copied: Cache, threads: int
) -> None:
    with open_stream(scored_cache) as sound:
        expected = [sound.next_batch() for _ in range(20)]
    path = sorted(Path(copied.storage.root).glob(f"scores/*/*/{OBJECT_NAME}"))[1]
    good = path.read_bytes()
    bad = bytes(byte ^ 0x55 for byte in good)
    with open_stream(copied, threads=threads, cached_bytes=1, ahead_bytes=5_000) as stream:
        done = failed = 0
        while done < len(expected):
            path.write_bytes(bad)
            try:
                while done < len(expected):
                    assert same(stream.next_batch(), expected[done])
                    done += 1
            except CorruptError as error:
                failed += str(path) in error.where
            path.write_bytes(good)
            if done < len(expected):
                assert same(stream.next_batch(), expected[done]), "restored, it goes on at once"
                done += 1
    assert failed > 3


def test_an_error_in_packing_is_raised_here(scored_cache: Cache) -> None:
    left = [200]

    def scarce(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no pinned memory is left")
        return np.empty(shape, dtype)

    with open_stream(scored_cache, scarce) as stream, open_stream(scored_cache) as other:
        assert same(stream.next_batch(), other.next_batch())
        with pytest.raises(MemoryError, match="pinned"):
            deque(zip(stream, other, strict=False), maxlen=0)
        left[0] = 10**6
        other.load_state_dict(stream.state_dict())
        assert same(stream.next_batch(), other.next_batch())


def test_closing_ends_all_threads(scored_cache: Cache) -> None:
    before = own_threads()
    stream = open_stream(scored_cache)
    stream.next_batch()
    stream._ahead.settle()
    assert len(own_threads() - before) == 4, "two that read, one that plans and one that packs"
    stream.close()
    assert own_threads() == before
    stream.close()
    with pytest.raises(ConfigError, match="an open stream; got a closed one"):
        stream.next_batch()
    with pytest.raises(ConfigError, match="an open stream"):
        stream.load_state_dict(stream.state_dict())


class Gate:
    """Holds up reads of blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let them pass."""
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        self.reads = 0
        read = RowReader.read

        def held(reader: RowReader, block: int) -> Block:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            self.reads += 1
            return read(reader, block)

        monkeypatch.setattr(RowReader, "read", held)

    def shut(self) -> None:
        """Hold up all that come."""
        self.open.clear()
        self.reached.clear()


def test_a_dropped_stream_ends_its_threads_and_reads_no_more(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, before = Gate(monkeypatch), own_threads()
    stream = open_stream(scored_cache, cached_bytes=1_000, ahead_bytes=10**6, block_rows=1)
    stream.next_batch()
    settle(stream)
    gate.shut()
    while not gate.reached.is_set():
        stream.load_state_dict(stream.state_dict())
        stream._ahead.fill(stream._plan, stream._position)
        gate.reached.wait(0.01)
    reads = gate.reads
    del stream
    gate.open.set()
    for thread in own_threads() - before:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert gate.reads - reads <= 2, "what had begun, one a thread"


def test_closing_while_blocks_are_read_waits_for_these_only(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, before = Gate(monkeypatch), own_threads()
    stream = open_stream(scored_cache, block_rows=1)
    gate.shut()
    stream._ahead.fill(stream._plan, stream._position)
    assert gate.reached.wait(WAIT_S)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._ahead.closed:
        gate.reached.wait(0.001)
    gate.open.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert own_threads() == before
    assert gate.reads <= 2


def test_going_to_another_state_leaves_nothing_wanted(scored_cache: Cache) -> None:
    with (
        open_stream(scored_cache, ahead_bytes=4_000) as stream,
        open_stream(scored_cache, ahead_bytes=1) as other,
    ):
        states = []
        for _ in range(12):
            states.append(other.state_dict())
            other.next_batch()
        for state in states * 2:
            stream.load_state_dict(state)
            other.load_state_dict(state)
            assert same(stream.next_batch(), other.next_batch())
        stream.load_state_dict(states[0])
        stream._ahead._packer.submit(int).result(WAIT_S)
        assert stream._ahead._blocks._in_use == 0


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_does_not_travel(scored_cache: Cache, duplicate: Callable[[Any], Any]) -> None:
    with open_stream(scored_cache) as stream:
        stream.next_batch()
        with pytest.raises(ConfigError, match="a process of its own"):
            duplicate(stream)


FORK = """
import gc, os, sys
from stillroom.cache.errors import ForkedError
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.step import Position, Step
from stillroom.replay.stream import ReplayStream

cache = Cache.open(sys.argv[1])
config = StreamConfig(batch_rows=5, max_tokens=40, block_rows=4, window_rows=5, threads=2)
stream = ReplayStream(Source(cache, cache.snapshot()), config)
rows = [stream.next_batch().rows for _ in range(3)]
child = os.fork()
if not child:
    for use in (stream.next_batch, lambda: next(iter(stream)), lambda: stream.skip(1),
                lambda: stream.load_state_dict(stream.state_dict())):
        try:
            use()
        except ForkedError as error:
            assert "the process that made it" in str(error) and "spawn" in str(error)
        else:
            os._exit(3)
    stream.close()
    del stream, use
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
rows += [stream.next_batch().rows for _ in range(3)]
again = ReplayStream(Source(cache, cache.snapshot()), config)
assert rows == [again.next_batch().rows for _ in range(6)]
print("the child refused, and the parent went on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_is_refused_at_once_and_ends(scored_cache: Cache) -> None:
    command = [sys.executable, "-c", FORK, str(scored_cache.storage.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the child refused, and the parent went on\n"


def test_a_program_that_ends_without_closing_ends(scored_cache: Cache) -> None:
    script = FORK.split("child = ")[0] + "print('the end')"
    command = [sys.executable, "-c", script, str(scored_cache.storage.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


def test_blocks_are_read_at_the_same_time(scored_cache: Cache, monkeypatch: Any) -> None:
    """Four threads wait for one another in their reads: one after another would never end."""
    together, read = threading.Barrier(4, timeout=30), RowReader.read
    left = threading.Semaphore(4)

    def meet(reader: RowReader, block: int) -> Any:
        if left.acquire(blocking=False):
            together.wait()
        return read(reader, block)

    monkeypatch.setattr(RowReader, "read", meet)
    with open_stream(scored_cache, threads=4) as stream:
        stream.next_batch()
    assert not together.broken


def test_an_interrupt_while_planning_ahead_loses_no_batch(scored_cache: Cache) -> None:
    with open_stream(scored_cache) as sound:
        expected = [sound.next_batch() for _ in range(10)]
    with open_stream(scored_cache, ahead_bytes=1) as stream:
        plan, calls = stream._plan, count()

        def interrupted(at: Position) -> tuple[Step, Position]:
            if next(calls) in (3, 4, 9):
                raise KeyboardInterrupt
            return plan(at)

        stream._plan = interrupted  # type: ignore[method-assign]
        found: list[Batch] = []
        interrupts = 0
        while len(found) < 10:
            try:
                found.append(stream.next_batch())
            except KeyboardInterrupt:
                interrupts += 1
    assert interrupts == 3
    assert all(map(same, found, expected))


@pytest.mark.parametrize("last_batch", ["keep", "drop", "carry"])
@pytest.mark.parametrize("half_life", [None, 1.0])
def test_skipping_is_taking_without_reading(
    scored_cache: Cache, last_batch: str, half_life: float | None
) -> None:
    settings: dict[str, Any] = {"last_batch": last_batch, "lag_half_life": half_life}
    with open_stream(scored_cache, **settings) as taken:
        for step in range(17):
            with open_stream(scored_cache, **settings) as skipped:
                skipped.skip(step // 2)
                skipped.skip(step - step // 2)
                assert skipped.state_dict() == taken.state_dict()
            taken.next_batch()
        with pytest.raises(ConfigError, match="steps to skip"):
            taken.skip(-1)
