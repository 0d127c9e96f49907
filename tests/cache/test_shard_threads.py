"""Threads that share a fresh shard: each gets the very numbers, whoever comes first."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, get_ident

import numpy as np
import pytest

from stillroom.cache.example_shards import random_shard
from stillroom.cache.identity import SHARD_FORMATS
from stillroom.cache.schema import Arrays
from stillroom.cache.shard import Shard
from stillroom.cache.shard_format import Reader, shard_format
from stillroom.cache.store import Cache
from stillroom.cache.testing_shard import OneObject, random_stored
from tests.cache.fakes import commit_shard, make_identity, same_bits

WAIT_S = 60
"""For events that come at once unless something is broken."""
COLUMNS = {
    "ids": ["topk_id"],
    "entries": ["topk_id", "topk_logprob", "topk_count"],
    "teacher": ["teacher_prompt_start", "teacher_prompt", "token"],
    "all": [],
}
"""Columns that are read at once; "all" has no names."""


class OneWaits(OneObject):
    """One object in memory; a chosen thread waits at its n-th read."""

    def __init__(self, data: bytes, at: int) -> None:
        """Let all pass until a thread is chosen."""
        super().__init__(data)
        self.chosen: int | None = None
        self.arrived, self.go = Event(), Event()
        self.has_waited = False
        self._left = at

    def get_ranges(
        self, path: str, starts: Sequence[int], lengths: Sequence[int], size: int | None = None
    ) -> list[bytes]:
        """Ranges of it, in good time."""
        if get_ident() == self.chosen:
            if not self._left:
                self.has_waited = True
                self.arrived.set()
                assert self.go.wait(WAIT_S)
            self._left -= 1
        return super().get_ranges(path, starts, lengths, size)


def spans(arrays: Arrays, names: list[str]) -> list[tuple[str, int, int]]:
    """All but the first entry of columns; of every one if none is named."""
    return [(name, 1, len(arrays[name])) for name in names or arrays]


def assert_read(reader: Reader, arrays: Arrays, names: list[str]) -> None:
    """The columns are those that were encoded."""
    wanted = spans(arrays, names)
    for (name, start, stop), found in zip(wanted, reader.read_ranges(wanted), strict=True):
        assert same_bits(found, arrays[name][start:stop]), name


@pytest.mark.parametrize("form", SHARD_FORMATS)
@pytest.mark.parametrize("late", COLUMNS)
@pytest.mark.parametrize("early", ["ids", "all"])
@pytest.mark.parametrize("mass", [False, True])
def test_another_thread_may_read_all_while_one_reads(
    form: str, late: str, early: str, mass: bool
) -> None:
    """Both begin on a fresh reader; the early one ends while the late one waits for bytes, at each
    of its reads in turn."""
    stored = random_stored(shard_format(form), mass=mass)
    waited = []
    for at in range(5):
        storage = OneWaits(stored.storage.data, at)
        reader = stored.form.open(replace(stored.source, storage=storage))

        def read_late(storage: OneWaits = storage, reader: Reader = reader) -> None:
            storage.chosen = get_ident()
            try:
                assert_read(reader, stored.arrays, COLUMNS[late])
            finally:
                storage.arrived.set()

        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(read_late)
            assert storage.arrived.wait(WAIT_S)
            waited.append(storage.has_waited)
            assert_read(reader, stored.arrays, COLUMNS[early])
            storage.go.set()
            ending.result(WAIT_S)
        assert_read(reader, stored.arrays, COLUMNS[late])
    assert waited[0]
    assert not waited[-1], "there are as many reads as were held up, or fewer"


@pytest.fixture
def _quick_switches() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_quick_switches")
@pytest.mark.parametrize("form", SHARD_FORMATS)
def test_many_threads_on_a_fresh_shard_get_the_same_rows(form: str, tmp_path: Path) -> None:
    threads, rounds, rows = 3, 8, 6
    changes = {"extra": 2, "extra_kind": "student", "mass": 0.9}
    cache = Cache.create(tmp_path / "cache", make_identity(shard_format=form, **changes))
    topk, vocab_size = cache.identity.topk, cache.identity.vocab_size
    arrays = random_shard(
        0, 90, rows, topk=topk, vocab_size=vocab_size, extra=2, mass=True, user_columns=True
    )
    commit = commit_shard(cache, arrays)
    expected = [cache.shard(commit).rows(row, row + 2) for row in range(rows - 1)]
    start = Barrier(threads)

    def read(shard: Shard, number: int) -> None:
        start.wait(WAIT_S)
        for row in np.random.default_rng(number).permutation(rows - 1).tolist():
            found = shard.rows(row, row + 2)
            assert found.keys() == expected[row].keys()
            assert all(same_bits(found[name], expected[row][name]) for name in found)

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            shard = cache.shard(commit)
            for done in [pool.submit(read, shard, number) for number in range(threads)]:
                done.result(WAIT_S)
