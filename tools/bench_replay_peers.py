"""The rows that a stream delivers, from other loaders: in the stream's own order where they read at
random, and as they shuffle themselves; packed into arrays of the same columns."""

import importlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from stillroom.cache.errors import MismatchError
from stillroom.cache.schema import Arrays
from stillroom.replay import ReplayStream, StreamConfig
from stillroom.replay.place import Span
from stillroom.tools.bench_peers import COLUMNS, Peer, peers
from stillroom.tools.bench_stream import Delivered, Replayed, checksum, measuring

BUFFER = 1000
"""Rows that webdataset shuffles among themselves."""
EPOCH_S = 8.0
"""An epoch that takes longer is left."""
Open = Callable[[Path, list[int]], Iterable[Arrays]]
"""Opens what was written, and reads the rows of these numbers, or all in an order of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerSpeed:
    """One loader."""

    name: str
    first: Delivered | None = None
    """The first epoch, with opening and unpacking."""
    later: Delivered | None = None
    """The next one, from what is unpacked and open."""
    failed: str | None = None
    """Why there are no figures."""


@dataclass(frozen=True, slots=True)
class Loader:
    """One way to read another store shuffled."""

    name: str
    peer: str
    """Name of the store in `bench_peers`."""
    in_order: bool
    """Whether it gives the rows that it is asked for, in that order."""
    opens: Open


def loaders() -> list[str]:
    """Names of those whose packages are installed."""
    installed = {peer.name for peer in peers()}
    return [loader.name for loader in LOADERS if loader.peer in installed]


def measure_peer(name: str, replayed: Replayed, config: StreamConfig) -> PeerSpeed:
    """Write the rows as a peer stores them, and read two epochs of as many as there are.

    Args:
        name: one of `loaders()`.
        replayed: the rows.
        config: seed and sizes of the order and of batches.

    Raises:
        MismatchError: it gave other ids than were asked for.
    """
    loader = next(loader for loader in LOADERS if loader.name == name)
    peer = next(peer for peer in peers() if peer.name == loader.peer)
    rows = replayed.rows()
    order = replay_order(replayed, config, len(rows))
    sums = [checksum(row["topk_id"]) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        peer.write(rows, Path(folder))
        del rows
        return _measure(loader, peer, Path(folder), order, config.batch_rows, sums)


def replay_order(replayed: Replayed, config: StreamConfig, rows: int) -> list[int]:
    """The first so many rows of the stream's first epoch, by their numbers in one copy of the
    parts."""
    with ReplayStream(replayed.source(), config) as stream:
        (feed,) = stream.feeds
        units = feed.units_of(Span(0, 0, rows))
        return [row % rows for unit in units for row in unit.rows]


def packed(rows: Iterable[Arrays], batch_rows: int) -> Iterator[Arrays]:
    """Rows end to end, so many at a time."""
    left = (row for row in rows)  # litdata begins again each time that it is iterated
    while batch := list(islice(left, batch_rows)):
        yield {name: np.concatenate([np.asarray(row[name]) for row in batch]) for name in COLUMNS}


def check_rows(name: str, found: list[int], sums: list[int], order: list[int] | None) -> None:
    """See that a loader gave the rows that it was asked for.

    Args:
        name: of the loader, for the message.
        found: checksums of the rows that it gave, the first ones of an epoch.
        sums: checksums of all rows.
        order: in which rows were asked for; None for any order in which no row comes twice.

    Raises:
        MismatchError: it gave others.
    """
    if order is None:
        right = not Counter(found) - Counter(sums)
    else:
        right = found == [sums[i] for i in order[: len(found)]]
    if not found or not right:
        do = "Report this: its speed says nothing."
        raise MismatchError(name, "the rows that were asked for", "others", do)


def _measure(
    loader: Loader, peer: Peer, folder: Path, order: list[int], batch_rows: int, sums: list[int]
) -> PeerSpeed:
    importlib.import_module(peer.package)
    with measuring() as first:
        rows = loader.opens(folder, order)
        first.positions = _drained(packed(rows, batch_rows))
    with measuring() as later:
        later.positions = _drained(packed(rows, batch_rows))
    found = [checksum(np.asarray(row["topk_id"])) for row in _for_a_while(rows)]
    check_rows(loader.name, found, sums, order if loader.in_order else None)
    return PeerSpeed(name=loader.name, first=first.found(), later=later.found())


def _drained(batches: Iterable[Arrays]) -> int:
    return sum(len(batch["sampled_logprob"]) for batch in _for_a_while(batches))


def _for_a_while(items: Iterable[Arrays]) -> Iterator[Arrays]:
    """What comes within EPOCH_S; the first in any case."""
    end = time.perf_counter() + EPOCH_S
    for item in items:
        yield item
        if time.perf_counter() > end:
            return


@dataclass(frozen=True, slots=True)
class _AtRandom:
    """Rows read one by one in a given order."""

    read: Callable[[int], Arrays]
    order: list[int]

    def __iter__(self) -> Iterator[Arrays]:
        return map(self.read, self.order)


def _at_random(peer_name: str) -> Open:
    def opens(folder: Path, order: list[int]) -> Iterable[Arrays]:
        peer = next(peer for peer in peers() if peer.name == peer_name)
        assert peer.random is not None
        return _AtRandom(peer.random(folder), order)

    return opens


def _shuffled_litdata(folder: Path, _: list[int]) -> Iterable[Arrays]:
    from litdata import StreamingDataset

    found: Iterable[Arrays] = StreamingDataset(str(folder / "litdata"), shuffle=True)
    return found


@dataclass(frozen=True, slots=True)
class _ShuffledTar:
    """webdataset's rows, through its buffer."""

    path: Path

    def __iter__(self) -> Iterator[Arrays]:
        import webdataset

        for item in webdataset.WebDataset(str(self.path), shardshuffle=False).shuffle(BUFFER):
            with np.load(io.BytesIO(item["npz"])) as arrays:
                yield {name: arrays[name] for name in arrays.files}


def _shuffled_webdataset(folder: Path, _: list[int]) -> Iterable[Arrays]:
    return _ShuffledTar(folder / "rows.tar")


LOADERS = (
    Loader("litdata, our order", "litdata, zstd", True, _at_random("litdata, zstd")),
    Loader("litdata, its shuffle", "litdata, zstd", False, _shuffled_litdata),
    Loader("webdataset, its shuffle", "webdataset, npz", False, _shuffled_webdataset),
    Loader("HF datasets, our order", "HF datasets", True, _at_random("HF datasets")),
)
