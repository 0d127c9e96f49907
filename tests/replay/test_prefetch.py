"""Reading ahead: bounded, errors in the caller's thread, and threads that end."""

import gc
import random
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields, replace
from itertools import chain, count
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
from stillroom.replay.prefetch import MOST_STEPS, PACK_THREADS, Prefetch
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


def rest(pool: ThreadPoolExecutor) -> None:
    """Wait until a pool has done all that was asked of it."""
    together = threading.Barrier(pool._max_workers + 1, timeout=WAIT_S)
    for _ in range(pool._max_workers):
        pool.submit(together.wait)
    together.wait()


def settle(stream: ReplayStream) -> Prefetch:
    """Wait until as many steps are on their way as the bounds allow, and all of them are ready."""
    ahead, before = stream._ahead, None
    while before != (batches := [batch for _, batch in ahead._ahead.copy()]):
        assert not wait(batches, WAIT_S).not_done
        rest(ahead._pack_pool)
        rest(ahead._plan_pool)
        before = batches
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
    full = threading.Event()

    def scarce(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if full.is_set():
            raise MemoryError("no pinned memory is left")
        return np.empty(shape, dtype)

    with open_stream(scored_cache, scarce) as stream, open_stream(scored_cache) as other:
        assert same(stream.next_batch(), other.next_batch())
        full.set()
        with pytest.raises(MemoryError, match="pinned"):
            deque(zip(stream, other, strict=False), maxlen=0)
        full.clear()
        other.load_state_dict(stream.state_dict())
        assert same(stream.next_batch(), other.next_batch())


def test_closing_ends_all_threads(scored_cache: Cache) -> None:
    before = own_threads()
    stream = open_stream(scored_cache)
    stream.next_batch()
    settle(stream)
    found = Counter(thread.name.rpartition("_")[0] for thread in own_threads() - before)
    assert found.keys() == {"stillroom-read", "stillroom-plan", "stillroom-pack"}
    assert found <= Counter({"stillroom-read": 2, "stillroom-plan": 1, "stillroom-pack": 2})
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
        stream._ahead.fill(stream._position)
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
    stream._ahead.fill(stream._position)
    assert gate.reached.wait(WAIT_S)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._ahead._plan_pool._shutdown:  # the last one that is told to end
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
        rest(stream._ahead._pack_pool)
        rest(stream._ahead._plan_pool)
        assert not stream._ahead._ahead, "no step is planned until one is wanted"
        assert stream._ahead._blocks._in_use == 0


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


def test_two_batches_are_packed_at_the_same_time_and_do_not_mix(scored_cache: Cache) -> None:
    together, met = threading.Barrier(2, timeout=WAIT_S), threading.local()

    def meet(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if not hasattr(met, "once"):
            met.once = together.wait()
        return np.empty(shape, dtype)

    with open_stream(scored_cache, meet) as stream, open_stream(scored_cache) as other:
        for _ in range(20):
            assert same(stream.next_batch(), other.next_batch())
    assert not together.broken


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("can't start new thread")])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("pool", ["_plan_pool", "_pack_pool", "_read_pool"])
def test_no_step_is_lost_where_threads_are_asked_in_vain(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch, pool: str, queued: bool, error: Any
) -> None:
    """A thread that cannot start, and an interrupt, leave what was asked for queued or not. Only
    the main thread is interrupted."""
    with open_stream(scored_cache) as sound:
        expected = [(sound.state_dict(), sound.next_batch()) for _ in range(12)]
    failed = 0
    for ahead_bytes in (1, 4_000):
        stream, rng = open_stream(scored_cache, ahead_bytes=ahead_bytes), random.Random(ahead_bytes)
        submit, found = getattr(stream._ahead, pool).submit, 0
        fails = chain([True], (rng.random() < 0.3 for _ in count()))

        def scarce(*work: Any, submit: Any = submit, fails: Iterator[bool] = fails) -> Any:
            if threading.current_thread() is threading.main_thread():
                fails_now = next(fails)
            else:
                fails_now = error is not KeyboardInterrupt and random.random() < 0.3
            asked = submit(*work) if queued or not fails_now else None
            if fails_now:
                raise error
            return asked

        monkeypatch.setattr(getattr(stream._ahead, pool), "submit", scarce)
        while found < len(expected):
            state, batch = expected[found]
            assert stream.state_dict() == state
            try:
                assert same(stream.next_batch(), batch)
                found += 1
            except (KeyboardInterrupt, RuntimeError):
                failed += 1
                assert failed < 1_000
        stream.close()
        assert stream._ahead._blocks._in_use == 0
    assert failed or pool == "_plan_pool", "where planning has no thread, the next take plans"


class PlanGate:
    """Holds up the planning of steps from one on, or has it fail."""

    def __init__(self, stream: ReplayStream) -> None:
        """Let all pass."""
        self.open, self.failing = threading.Event(), 10**6
        self.open.set()
        plan = stream._ahead._plan

        def held(at: Position) -> tuple[Step, Position]:
            assert self.open.wait(WAIT_S)
            if at.step >= self.failing:
                raise OSError("lengths of rows cannot be read")
            return plan(at)

        stream._ahead._plan = held


def test_steps_that_are_ready_do_not_wait_for_planning(scored_cache: Cache) -> None:
    with open_stream(scored_cache, batch_rows=1) as stream, open_stream(scored_cache) as other:
        gate = PlanGate(stream)
        stream.next_batch()
        settle(stream)
        gate.open.clear()
        for _ in range(MOST_STEPS):
            stream.next_batch()
        planning = stream._ahead._planning
        assert planning is not None
        assert not planning.done()
        gate.open.set()
        other.load_state_dict(stream.state_dict())
        assert stream.next_batch().rows == other.next_batch().rows[:1]


def test_what_fails_far_ahead_is_raised_when_its_turn_comes(scored_cache: Cache) -> None:
    with open_stream(scored_cache) as stream, open_stream(scored_cache) as other:
        gate = PlanGate(stream)
        gate.failing = 6
        for _ in range(6):
            assert same(stream.next_batch(), other.next_batch())
        for _ in range(2):
            with pytest.raises(OSError, match="lengths"):
                stream.next_batch()
        gate.failing = 20
        for _ in range(14):
            assert same(stream.next_batch(), other.next_batch())


def test_an_interrupted_drop_is_made_up_for(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with open_stream(scored_cache, batch_rows=1) as stream, open_stream(scored_cache) as other:
        gate.shut()
        stream._ahead.fill(stream._position)
        _, batch = stream._ahead._ahead[PACK_THREADS + 2]
        cancel, interrupts = batch.cancel, [KeyboardInterrupt]

        def interrupted() -> bool:
            cancelled = cancel()
            assert cancelled
            if interrupts:
                raise interrupts.pop()
            return cancelled

        monkeypatch.setattr(batch, "cancel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.skip(0)
        gate.open.set()
        assert stream.next_batch().rows == other.next_batch().rows[:1]
    assert stream._ahead._blocks._in_use == 0


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
