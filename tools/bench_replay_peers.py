"""The rows that a stream delivers, from other loaders: in the stream's own order where they read at
random, and as they shuffle themselves; packed into arrays of the same columns."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from stillroom.cache.errors import MismatchError
from stillroom.cache.schema import Arrays
from stillroom.replay import ReplayConfig, ReplayStream
from stillroom.replay.place import Span
from stillroom.tools.bench_peers import COLUMNS, Peer, peers
from stillroom.tools.bench_stream import Delivered, Replayed, checksum, measuring

BUFFER = 1000
"""Rows that webdataset shuffles among themselves."""
Open = Callable[[Path, list[int]], Iterable[Arrays]]
"""Opens what was written, and reads the rows of these numbers, or as many in an order of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerSpeed:
    """One loader."""

    name: str
    first: Delivered
    """The first epoch, with opening and unpacking."""
    later: Delivered
    """The next one, from what is unpacked and open."""


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


def measure_peer(name: str, replayed: Replayed, config: ReplayConfig) -> PeerSpeed:
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
    asked = order if loader.in_order else range(len(rows))
    with tempfile.TemporaryDirectory() as folder:
        peer.write(rows, Path(folder))
        expected = sum(checksum(rows[i]["topk_id"]) for i in asked)
        del rows
        return _measure(loader, peer, Path(folder), order, config.batch_rows, expected)


def replay_order(replayed: Replayed, config: ReplayConfig, rows: int) -> list[int]:
    """The first so many rows of the stream's first epoch, by their numbers in one copy of the
    parts."""
    with ReplayStream(replayed.source(), config) as stream:
        (feed,) = stream.feeds
        units = feed.units_of(Span(0, 0, rows))
        return [int(feed.selection.rows[row]) % rows for _, unit in units for row in unit]


def packed(rows: Iterable[Arrays], batch_rows: int) -> Iterator[Arrays]:
    """Rows end to end, so many at a time."""
    left = iter(rows)
    while batch := list(islice(left, batch_rows)):
        yield {name: np.concatenate([np.asarray(row[name]) for row in batch]) for name in COLUMNS}


def _measure(
    loader: Loader, peer: Peer, folder: Path, order: list[int], batch_rows: int, expected: int
) -> PeerSpeed:
    __import__(peer.package)
    with measuring() as first:
        found = loader.opens(folder, order)
        first.positions = _drained(packed(found, batch_rows))
    with measuring() as later:
        later.positions = _drained(packed(found, batch_rows))
    ids = sum(checksum(batch["topk_id"]) for batch in packed(found, batch_rows))
    if ids != expected:
        do = "Report this: its speed says nothing."
        raise MismatchError(loader.name, f"ids that add up to {expected}", f"{ids}", do)
    return PeerSpeed(name=loader.name, first=first.found(), later=later.found())


def _drained(batches: Iterable[Arrays]) -> int:
    return sum(len(batch["sampled_logprob"]) for batch in batches)


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
