"""Blocks read by threads: bounded, shared, read once, retried after an error."""

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.replay.blocks import Blocks

WAIT_S = 20
"""For events that come at once unless something is broken."""


class Reader:
    """Reads block n as the text of n, n + 1 bytes large; counts, and can be held up or fail."""

    def __init__(self) -> None:
        """Read at once."""
        self.reads: Counter[int] = Counter()
        self.gate, self.began = Event(), Event()
        self.gate.set()
        self.failing: set[int] = set()
        self._lock = Lock()

    def __call__(self, key: int) -> str:
        """Read a block."""
        self.began.set()
        assert self.gate.wait(WAIT_S)
        with self._lock:
            self.reads[key] += 1
        if key in self.failing:
            raise OSError(f"block {key} is damaged")
        return str(key)


@pytest.fixture
def reader() -> Reader:
    """Reads at once."""
    return Reader()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Two threads."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


def size(key: int) -> int:
    """Bytes of a block."""
    return key + 1


def make(reader: Reader, pool: ThreadPoolExecutor, limit: int) -> Blocks[int, str]:
    """Blocks of that reader."""
    return Blocks(reader, size, pool, limit)


def settle(pool: ThreadPoolExecutor) -> None:
    """Wait until all that was submitted before is done."""
    gate = Event()
    ends = [pool.submit(gate.wait, WAIT_S) for _ in range(pool._max_workers)]
    gate.set()
    assert all(end.result() for end in ends)


def use(blocks: Blocks[int, str], keys: set[int]) -> list[str]:
    """Want blocks, take them, and let go."""
    blocks.want(keys)
    found = [blocks.get(key) for key in sorted(keys)]
    blocks.release(keys)
    return found


def test_a_block_that_two_want_is_read_once(reader: Reader, pool: ThreadPoolExecutor) -> None:
    reader.gate.clear()
    blocks = make(reader, pool, 10)
    blocks.want({3})
    blocks.want({3, 4})
    reader.gate.set()
    assert (blocks.get(3), blocks.get(4)) == ("3", "4")
    blocks.release({3})
    assert blocks.get(3) == "3", "the other still holds it"
    blocks.release({3, 4})
    assert use(blocks, {3, 4}) == ["3", "4"]
    assert reader.reads == {3: 1, 4: 1}


def test_what_was_used_longest_ago_goes_first(reader: Reader, pool: ThreadPoolExecutor) -> None:
    blocks = make(reader, pool, 4 + 5 + 6)
    for key in (3, 4, 5, 3):
        use(blocks, {key})
    assert blocks.bytes == 15
    use(blocks, {2})
    assert blocks.bytes == 4 + 6 + 3, "block 4 had not been used for longest"
    use(blocks, {5})
    use(blocks, {3})
    assert reader.reads == {2: 1, 3: 1, 4: 1, 5: 1}
    use(blocks, {4})
    assert reader.reads[4] == 2


def test_the_bound_is_kept_but_for_what_is_wanted_at_once(
    reader: Reader, pool: ThreadPoolExecutor
) -> None:
    blocks = make(reader, pool, 10)
    assert blocks.fits({9})
    assert blocks.fits({20, 30}), "nothing is in use, and later there is no more room"
    blocks.want({0})
    assert blocks.get(0) == "0"
    assert blocks.fits({4, 3})
    assert not blocks.fits({4, 5})
    blocks.release({0})
    blocks.want({20, 30})
    assert blocks.bytes == 21 + 31
    assert not blocks.fits({0})
    assert not blocks.fits({20}), "what is held already is more than the limit"
    assert [blocks.get(key) for key in (20, 30)] == ["20", "30"]
    blocks.release({20, 30})
    assert blocks.bytes == 0
    use(blocks, {9})
    assert blocks.bytes == 10
    assert blocks.fits({4}), "what nobody uses makes room"


def test_what_one_holds_costs_another_nothing(reader: Reader, pool: ThreadPoolExecutor) -> None:
    blocks = make(reader, pool, 10)
    blocks.want({5})
    assert blocks.fits({5, 3})
    assert not blocks.fits({5, 4})


def test_a_failed_block_is_read_again_when_it_is_next_wanted(
    reader: Reader, pool: ThreadPoolExecutor
) -> None:
    blocks = make(reader, pool, 10)
    reader.failing = {4}
    for _ in range(2):
        blocks.want({4})
        with pytest.raises(OSError, match="block 4 is damaged"):
            blocks.get(4)
        blocks.release({4})
    assert reader.reads[4] == 2
    reader.failing = set()
    assert use(blocks, {4}) == ["4"]
    assert blocks.bytes == 5


def test_a_failed_block_is_read_again_though_another_has_not_let_go(
    reader: Reader, pool: ThreadPoolExecutor
) -> None:
    blocks = make(reader, pool, 10)
    reader.failing = {4}
    blocks.want({4})
    with pytest.raises(OSError, match="block 4"):
        blocks.get(4)
    reader.failing = set()
    blocks.want({4})
    assert blocks.get(4) == "4"
    blocks.release({4})
    assert blocks.get(4) == "4", "held by the first, who may ask again"
    blocks.release({4})
    assert blocks.bytes == 5
    assert reader.reads[4] == 2


def test_nothing_is_wanted_where_a_read_cannot_be_asked_for(
    reader: Reader, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, submit = make(reader, pool, 100), pool.submit
    blocks.want({1})

    def scarce(read: Reader, key: int) -> Future[str]:
        if key == 3:
            raise RuntimeError("can't start new thread")
        return submit(read, key)

    monkeypatch.setattr(pool, "submit", scarce)
    with pytest.raises(RuntimeError, match="new thread"):
        blocks.want([1, 2, 3, 4])
    assert blocks._in_use == 2, "block 1 is wanted still"
    monkeypatch.undo()
    assert use(blocks, {1, 2, 3, 4}) == ["1", "2", "3", "4"]


def test_what_is_released_before_its_turn_is_not_read(reader: Reader) -> None:
    with ThreadPoolExecutor(1) as pool:
        reader.gate.clear()
        blocks = make(reader, pool, 100)
        blocks.want({1})
        assert reader.began.wait(WAIT_S)
        blocks.want({2, 3})
        blocks.want({3})
        blocks.release({1})
        blocks.release({2, 3})
        assert blocks.bytes == 2 + 4, "1 is being read, and 3 is wanted"
        reader.gate.set()
        assert blocks.get(3) == "3"
        blocks.release({3})
    assert reader.reads == {1: 1, 3: 1}


def test_a_block_on_its_way_counts_and_is_not_read_twice(reader: Reader) -> None:
    with ThreadPoolExecutor(1) as pool:
        reader.gate.clear()
        blocks = make(reader, pool, 1)
        blocks.want({5})
        assert reader.began.wait(WAIT_S)
        blocks.release({5})
        assert blocks.bytes == 6, "it is being read: the memory is taken"
        blocks.want({5})
        reader.gate.set()
        assert blocks.get(5) == "5"
        blocks.release({5})
        assert blocks.bytes == 0
    assert reader.reads == {5: 1}


actions = st.lists(
    st.tuples(st.sampled_from(["want", "release", "fail", "heal"]), st.sets(st.integers(0, 7))),
    max_size=40,
)


@settings(max_examples=60)
@given(actions, st.integers(1, 40))
def test_any_order_of_wants_and_releases_keeps_the_account(
    actions: list[tuple[str, set[int]]], limit: int
) -> None:
    reader = Reader()
    with ThreadPoolExecutor(2) as pool:
        blocks = make(reader, pool, limit)
        held: list[set[int]] = []
        for action, keys in actions:
            if action in ("fail", "heal"):
                settle(pool)
                reader.failing = keys if action == "fail" else set()
            elif action == "want":
                blocks.want(keys)
                held.append(keys)
                settle(pool)
                assert all(_is_true(blocks, key) for key in keys - reader.failing)
            elif held:
                blocks.release(held.pop(0))
            settle(pool)
            in_use = set().union(*held)
            taken = sum(map(size, in_use))
            assert blocks._in_use == taken
            assert taken <= blocks.bytes <= max(limit, taken)
            together = sum(map(size, in_use | keys))
            assert blocks.fits(keys) == (not in_use or together <= limit)
        for keys in held:
            blocks.release(keys)
        assert blocks._in_use == 0
        assert blocks.bytes <= limit


def _is_true(blocks: Blocks[int, str], key: int) -> bool:
    return blocks.get(key) == str(key)


def test_many_threads_get_what_they_want_and_nothing_is_left(reader: Reader) -> None:
    limit, workers, rounds = 60, 8, 200
    with ThreadPoolExecutor(3) as pool, ThreadPoolExecutor(workers) as users:
        blocks = make(reader, pool, limit)

        def hammer(seed: int) -> int:
            rng = random.Random(seed)
            failed = 0
            for _ in range(rounds):
                keys = {rng.randrange(16) for _ in range(rng.randrange(4))}
                reader.failing = {rng.randrange(40)}
                blocks.want(keys)
                for key in keys:
                    try:
                        assert blocks.get(key) == str(key)
                    except OSError as error:
                        failed += str(error) == f"block {key} is damaged"
                assert blocks.bytes <= limit + workers * 3 * 16 + 3 * 16
                blocks.release(keys)
            return failed

        assert sum(users.map(hammer, range(workers))) > 0, "some reads fail"
        settle(pool)
        reader.failing = set()
        use(blocks, {0})
        assert blocks._in_use == 0
        assert blocks.bytes == sum(held.bytes for held in blocks._held.values()) <= limit
