"""Memory is used again when nothing lies in it any more, and never before."""

import gc
import random
import threading
from typing import Any

import numpy as np
import pytest

from stillroom.cache.recycler import LEAST_BYTES, Recycler

LARGE = (LEAST_BYTES // 4, 4)


def address(array: np.ndarray) -> int:
    """Where an array begins."""
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.uint32, np.int64])
@pytest.mark.parametrize("shape", [0, 7, (0, 3), (5, 64), (3000, 64), (1, 100_001)])
def test_it_gives_what_was_asked_for(shape: Any, dtype: Any) -> None:
    made, like = Recycler(1 << 30).empty(shape, dtype), np.empty(shape, dtype)
    assert (made.shape, made.dtype) == (like.shape, like.dtype)
    assert made.flags.c_contiguous
    assert made.flags.writeable


def test_memory_is_used_again_once_nothing_lies_in_it() -> None:
    recycler = Recycler(1 << 30)
    first = recycler.empty(LARGE, np.uint32)
    at, view = address(first), first[3:, 1]
    del first
    assert address(recycler.empty(LARGE, np.uint32)) != at, "a view is left"
    del view
    found = {address(array) for array in [recycler.empty(LARGE, np.uint32) for _ in range(2)]}
    assert at in found
    assert recycler.bytes == 2 * 4 * LEAST_BYTES


def test_what_is_free_is_let_go_beyond_the_limit() -> None:
    recycler = Recycler(10 * LEAST_BYTES)
    kept = recycler.empty(4 * LEAST_BYTES, np.uint8)
    for size in range(LEAST_BYTES, 6 * LEAST_BYTES, LEAST_BYTES // 3):
        recycler.empty(size, np.uint8)
        assert recycler.bytes <= 10 * LEAST_BYTES
    kept[:] = 3
    assert recycler.bytes >= kept.nbytes


def test_no_more_is_let_go_than_a_new_array_takes() -> None:
    recycler = Recycler(10 * LEAST_BYTES)
    held = [recycler.empty(size * LEAST_BYTES, np.uint8) for size in (2, 3, 4)]
    del held
    recycler.empty(LEAST_BYTES * 5 // 2, np.uint8)
    assert recycler.bytes >= 7 * LEAST_BYTES


def test_after_clearing_it_holds_nothing_and_arrays_stay() -> None:
    recycler = Recycler(1 << 30)
    kept = recycler.empty(LARGE, np.uint32)
    kept[:] = 7
    recycler.empty((LEAST_BYTES,), np.uint8)
    recycler.clear()
    assert recycler.bytes == 0
    made = recycler.empty(LARGE, np.uint32)
    made[:] = 8
    assert address(made) != address(kept)
    assert (kept == 7).all()
    assert recycler.bytes == made.nbytes


def test_buffers_in_use_are_not_looked_through_for_every_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, let_go = [], Recycler._let_go

    def counted(recycler: Recycler, needed: int) -> None:
        looks.append(needed)
        let_go(recycler, needed)

    monkeypatch.setattr(Recycler, "_let_go", counted)
    recycler = Recycler(64 * LEAST_BYTES)
    held = [recycler.empty(LEAST_BYTES, np.uint8) for _ in range(200)]
    assert 0 < len(looks) <= 136 / 4
    del held
    for size in range(2, 12):
        recycler.empty(size * LEAST_BYTES, np.uint8)
    assert recycler.bytes <= 64 * LEAST_BYTES, "what is free goes once they are used no more"


def test_arrays_in_use_never_overlap() -> None:
    """Threads write their own number into arrays that they hold and drop at random."""
    recycler, wrong = Recycler(8 << 20), []

    def work(number: int) -> None:
        rng, held = random.Random(number), []
        for _ in range(400):
            array = recycler.empty(
                rng.choice([LEAST_BYTES, LEAST_BYTES + 9, 3 * LEAST_BYTES]), "u1"
            )
            array[:] = number
            held.append(array[rng.randrange(9) :])
            if len(held) > rng.randrange(6):
                dropped = held.pop(rng.randrange(len(held)))
                wrong.extend(dropped[dropped != number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
