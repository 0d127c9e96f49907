"""`stillroom bench store`: bytes a position, and positions a second written and read, of both shard
formats and of other stores, on the same scores in one run; and how opening grows with the number of
shards.

Everything runs in one process, one after another; every speed is the best of five. Other stores
hold six columns and check no hashes; Stillroom's hold all and check every byte. The limit is the
codec alone: PCodec decoding all of a shard's chunks from memory into buffers that are used again.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pcodec import standalone

from stillroom.cache.commits import Commit
from stillroom.cache.part import PartMeta
from stillroom.cache.progress import Progress
from stillroom.cache.shard import Shard
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.tools.bench_data import Sample
from stillroom.tools.bench_peers import Peer, peers, rows_of

REPEATS = 5
RANDOM_READS = 64
RANDOM_POSITIONS = 500
SHARD_FORMATS = ("zarr", "parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One store."""

    store: str
    bytes_per_position: float
    write_positions_s: float
    read_positions_s: float
    """Everything, into NumPy: a whole shard at once, or one sequence after another."""
    random_ms: float | None
    """Median of single sequences at random, of about 500 positions where there are such; warm."""
    share_of_limit: float | None = None
    """Sequential reading against the codec alone."""
    columns: dict[str, float] | None = None
    """Bytes a position by stored array."""


def bench_store(sample: Sample, *, with_peers: bool = True) -> list[Figures]:
    """Measure both shard formats, and other stores, on the same scores.

    Args:
        sample: the scores.
        with_peers: measure other stores too.
    """
    others = peers() if with_peers else []
    found = []
    with Progress("bench", len(SHARD_FORMATS) + len(others), "stores") as progress:
        for name in SHARD_FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                found.append(_shard_format(sample, name, Path(folder)))
            progress.advance(1)
        rows = rows_of(sample.arrays)
        for peer in others:
            with tempfile.TemporaryDirectory() as folder:
                found.append(_peer(peer, rows, sample.positions, Path(folder)))
            progress.advance(1)
    return found


def _shard_format(sample: Sample, name: str, folder: Path) -> Figures:
    cache = Cache.create(folder, replace(sample.identity, shard_format=name))
    made: list[Commit] = []

    def write() -> None:
        commit = cache.add_shard(_meta(sample, len(made)), "0" * 32, sample.arrays, _NOBODY)
        assert commit is not None
        made.append(commit)

    write_s = _best(write)
    shard = cache.shard(made[0])
    read_s = _best(shard.all_rows)
    random_ms = _random(lambda i: shard.rows(i, i + 1), _near(rows_of(sample.arrays)))
    limit_s = _best(_bare(shard, cache)) if name == "zarr" else None
    stored = {
        n: sum(chunk.length for chunk in entry.chunks) / sample.positions
        for n, entry in shard.manifest.arrays.items()
    }
    commit_bytes = len(made[0].to_json())
    return Figures(
        store=f"Stillroom, {name}",
        bytes_per_position=(made[0].stored_bytes + commit_bytes) / sample.positions,
        write_positions_s=sample.positions / write_s,
        read_positions_s=sample.positions / read_s,
        random_ms=random_ms,
        share_of_limit=limit_s and limit_s / read_s,
        columns=stored,
    )


def _bare(shard: Shard, cache: Cache) -> Callable[[], None]:
    """Decode every chunk of a shard from memory, into one buffer an array."""
    data = cache.storage.get(shard.path)
    work = []
    for entry in shard.manifest.arrays.values():
        chunks = [data[c.offset : c.offset + c.length] for c in entry.chunks]
        if chunks:
            numbers = standalone.simple_decompress(chunks[0])
            work.append((chunks, np.empty_like(numbers)))

    def decode() -> None:
        for chunks, buffer in work:
            for chunk in chunks:
                standalone.simple_decompress_into(chunk, buffer)

    return decode


def _peer(peer: Peer, rows: list[Any], positions: int, folder: Path) -> Figures:
    folders = [folder / str(i) for i in range(REPEATS)]
    for each in folders:
        each.mkdir()
    left = iter(folders)
    importlib.import_module(peer.package)
    write_s = _best(lambda: peer.write(rows, next(left)))
    stored = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    read_s = _best(lambda: _drain(peer.sequential(folders[0])))
    random_ms = None if peer.random is None else _random(peer.random(folders[0]), _near(rows))
    return Figures(
        store=peer.name,
        bytes_per_position=stored / positions,
        write_positions_s=positions / write_s,
        read_positions_s=positions / read_s,
        random_ms=random_ms,
    )


def _near(rows: list[Any]) -> list[int]:
    """The sequences whose lengths are nearest to 500 positions, a quarter of all."""
    lengths = np.array([len(row["sampled_logprob"]) for row in rows])
    order = np.argsort(np.abs(lengths - RANDOM_POSITIONS), kind="stable")
    return [int(i) for i in order[: max(1, len(rows) // 4)]]


def _random(read: Callable[[int], Any], among: list[int]) -> float:
    order = np.random.default_rng(0).choice(among, RANDOM_READS).tolist()
    read(order[0])
    taken = [_timed(lambda i=i: read(i)) for i in order]  # type: ignore[misc]
    return float(np.median(taken)) * 1e3


def _best(work: Callable[[], Any]) -> float:
    return min(_timed(work) for _ in range(REPEATS))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _drain(items: Iterable[Any]) -> None:
    for _ in items:
        pass


_NOBODY = ScoredBy(teacher_s=0.0, scorer={"host": "bench"})


def _meta(sample: Sample, number: int) -> PartMeta:
    return PartMeta(
        policy_version=0,
        unit=f"{number:016x}",
        tokenizer_fingerprint=sample.identity.tokenizer_fingerprint,
        vocab_size=sample.identity.vocab_size,
        sampler={"temperature": 1.0},
    )


def as_json(figures: list[Figures]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(row) for row in figures]
