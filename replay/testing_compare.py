"""How what a restored stream gave is held against what an unbroken one gave; raises AssertionError
where they differ.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from stillroom.cache.testing_shard import expect
from stillroom.replay.testing_record import Held, Record

HOW_READ = {"threads", "cached_bytes", "ahead_bytes"}
"""Settings that change no byte of a batch."""
OF_STEP = ("epoch", "first", "rows", "caches", "num_positions")


def num_rows(record: Record) -> int:
    """Rows of a step, all ranks."""
    return len(record.rows)


def compare(
    expected: Sequence[Record],
    found: Sequence[Sequence[Record]],
    changes: Mapping[str, Any],
    last_batch: str,
    what: str,
) -> None:
    """Fail unless a restored stream gave what it had to.

    Args:
        expected: the unbroken run's records from the restored step on, made on one rank.
        found: records by step and rank; with another batch, of as many rows at least.
        changes: settings of the restored stream that are other than in the run.
        last_batch: the run's.
        what: names the case in messages.
    """
    if "batch_rows" in changes:
        for ranks in found:
            _expect_agreement(ranks, what)
        _expect_order(expected, found, last_batch == "drop", what)
        return
    for i, (wanted, ranks) in enumerate(zip(expected, found, strict=False)):
        here = f"{what}, {i} steps on"
        _expect_agreement(ranks, here)
        for name in OF_STEP:
            _expect_equal(getattr(ranks[0], name), getattr(wanted, name), f"{here}: {name}")
        _expect_equal(_held(ranks), list(wanted.held), f"{here}: held rows")
        if len(ranks) == 1 and changes.keys() <= HOW_READ:
            _expect_same_arrays(ranks[0], wanted, here)
    _expect_equal(len(found), len(expected), f"{what}: number of steps")


def _expect_agreement(ranks: Sequence[Record], what: str) -> None:
    """All ranks see the same step, in which each row is on one of them."""
    first = ranks[0]
    for rank, own in enumerate(ranks):
        for name in OF_STEP:
            _expect_equal(getattr(own, name), getattr(first, name), f"{what}: rank {rank}, {name}")
        counts = len(own.micro_batches), len(first.micro_batches)
        _expect_equal(*counts, f"{what}: rank {rank}, number of micro-batches")
    numbers = sorted(zip(first.caches, first.rows, strict=True))
    _expect_equal([held[:2] for held in _held(ranks)], numbers, f"{what}: rows of all ranks")


def _expect_same_arrays(found: Record, wanted: Record, what: str) -> None:
    counts = len(found.micro_batches), len(wanted.micro_batches)
    _expect_equal(*counts, f"{what}: number of micro-batches")
    for m, (own, other) in enumerate(zip(found.micro_batches, wanted.micro_batches, strict=True)):
        here = f"{what}, micro-batch {m}"
        _expect_equal(own is None, other is None, f"{here}: empty")
        for name in own or {}:
            _expect_equal((own or {})[name], (other or {})[name], f"{here}: {name}")


def _expect_order(
    expected: Sequence[Record], found: Sequence[Sequence[Record]], dropped: bool, what: str
) -> None:
    """Rows of each cache follow in the same order, with the same values. Where the last rows of an
    epoch are dropped, other batches leave out other rows: then up to the epoch's end."""
    taken = [ranks[0] for ranks in found]
    if dropped:
        epoch = expected[0].epoch
        expected = [record for record in expected if record.epoch == epoch]
        taken = [record for record in taken if record.epoch == epoch]
    for cache in sorted({cache for record in expected for cache in record.caches}):
        wanted, own = _rows_of(expected, cache), _rows_of(taken, cache)
        common = min(len(wanted), len(own))
        _expect_equal(own[:common], wanted[:common], f"{what}: order of rows of cache {cache}")
    values = {held[:2]: held for record in expected for held in record.held}
    for held in chain.from_iterable(map(_held, found)):
        _expect_equal(held, values.get(held[:2], held), f"{what}: values of a row")


def _rows_of(records: Sequence[Record], cache: int) -> list[int]:
    pairs = ((row, of) for r in records for row, of in zip(r.rows, r.caches, strict=True))
    return [row for row, of in pairs if of == cache]


def _held(ranks: Sequence[Record]) -> list[Held]:
    return sorted(held for record in ranks for held in record.held)


def _expect_equal(found: object, wanted: object, what: str) -> None:
    expect(found == wanted, f"{what}: {found!s:.300}, not {wanted!s:.300}")
