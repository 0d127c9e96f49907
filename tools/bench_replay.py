"""`stillroom bench replay`: packed positions a second that a stream delivers, beside other loaders
on the same rows in one run; how long a trainer waits for it; and what resuming costs.

Every figure comes from a process of its own. The stream checks every byte and has decoded nothing
before it is measured; the others check none.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.errors import InputError
from stillroom.cache.part import PartMeta
from stillroom.cache.progress import Progress
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.replay import StreamConfig
from stillroom.tools import bench_s3
from stillroom.tools.bench_data import made_up
from stillroom.tools.bench_replay_peers import PeerSpeed, loaders, measure_peer
from stillroom.tools.bench_stream import (
    WARM_UP,
    Delivered,
    Replayed,
    Resumed,
    Waited,
    alone,
    deliver,
    deliver_epochs,
    resume,
    wait,
)
from stillroom.tools.render import print_table, say

SHARDS = 5
LONGEST = 640
"""Positions of a made-up sequence; 370 on average."""
ROWS = 12_288
"""A snapshot of at least so many rows: about twice what a stream of the default settings has
decoded at once, so that it shows how one goes on that does not fit."""
THREADS = (1, 2, 0)
EVERYTHING = 1 << 40
"""More bytes than any measured snapshot has."""
S3_THREADS = 16
WAIT_S = 30.0
PEER_S = 180.0
"""A loader that takes longer, its writing included, is stopped."""
DELIVERED = ("loader", "threads", "first epoch", "next epoch", "cores", "memory MiB")
PEERS = ("loader", "first epoch", "next epochs", "cores", "memory MiB", "we are x", "x")


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """The stream with one number of threads."""

    threads: int
    first: Delivered
    """An epoch that begins with nothing decoded."""
    later: Delivered
    """The next one."""
    all_kept: bool = False
    """Whether the stream may keep every decoded block, so that the next epoch decodes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FromS3:
    """The stream from an object store."""

    threads: int
    speed: Delivered
    requests: int
    """Those of opening and of the snapshot too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayFigures:
    """All of one run."""

    rows: int
    positions: int
    copies: int
    topk: int
    streams: list[Streamed]
    """One of each number of threads; then one with the default threads that keeps all blocks."""
    peers: list[PeerSpeed]
    s3: FromS3 | None
    waited: Waited
    resumed: list[Resumed]

    @property
    def default(self) -> Streamed:
        """The stream with its default settings, with which the others are compared."""
        return next(row for row in reversed(self.streams) if not row.all_kept)


def bench_replay(
    root: str | None,
    *,
    positions: int,
    topk: int,
    tokens_s: float,
    with_peers: bool = True,
    with_s3: bool = False,
    rows: int = ROWS,
) -> ReplayFigures:
    """Measure replay.

    Args:
        root: the cache; None makes one up. Nothing is written to it.
        positions: to replay at least; parts are taken whole.
        topk: K of made-up scores.
        tokens_s: what the simulated trainer takes.
        with_peers: measure other loaders too.
        with_s3: measure from an object store too.
        rows: of the snapshot, which lists the parts as often as that takes.

    Raises:
        InputError: the cache has no scored part.
        ConfigError: there is no object store.
    """
    with _root(root, positions, topk) as found:
        replayed = _replayed(found, positions, rows)
        snapshot, config = replayed.source().snapshot, _config(replayed)
        names = loaders() if with_peers else []
        with Progress("bench", len(THREADS) + 1 + len(names) + with_s3 + 2, "figures") as progress:

            def done(value: Any) -> Any:
                progress.advance(1)
                return value

            return ReplayFigures(
                rows=snapshot.rows,
                positions=snapshot.positions,
                copies=replayed.copies,
                topk=Cache.open(found).identity.topk,
                streams=[
                    *(done(_streamed(replayed, threads)) for threads in THREADS),
                    done(_streamed(replayed, 0, all_kept=True)),
                ],
                peers=[done(_measured_peer(name, replayed, config)) for name in names],
                s3=_from_s3(replayed) if with_s3 else None,
                waited=done(alone(wait, replayed, config, tokens_s, WAIT_S)),
                resumed=done(alone(resume, replayed, config)),
            )


def _config(replayed: Replayed, threads: int = 0) -> StreamConfig:
    """The default settings, with a step of no more rows than there are."""
    default, rows = StreamConfig(threads=threads), replayed.source().snapshot.rows
    return replace(default, batch_rows=min(default.batch_rows, rows))


def _streamed(replayed: Replayed, threads: int, *, all_kept: bool = False) -> Streamed:
    config = _config(replayed, threads)
    if all_kept:
        config = replace(config, cached_bytes=EVERYTHING)
    first, later = alone(deliver_epochs, replayed, config, 2)
    used = config.read_threads(remote=False)
    return Streamed(threads=used, first=first, later=later, all_kept=all_kept)


def _measured_peer(name: str, replayed: Replayed, config: StreamConfig) -> PeerSpeed:
    """Another loader, in a process of its own that is given so much time."""
    try:
        found: PeerSpeed = alone(measure_peer, name, replayed, config, most_s=PEER_S)
    except (TimeoutError, EOFError) as error:
        found = PeerSpeed(name=name, failed=str(error))
    return found


@contextmanager
def _root(root: str | None, positions: int, topk: int) -> Iterator[str]:
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in range(SHARDS):
            sample = made_up(-(-positions // SHARDS), topk, longest=LONGEST, seed=number)
            cache = Cache.open(folder) if number else Cache.create(folder, sample.identity)
            meta = PartMeta(
                policy_version=0,
                unit=f"{number:016x}",
                tokenizer_fingerprint=sample.identity.tokenizer_fingerprint,
                vocab_size=sample.identity.vocab_size,
                sampler={"temperature": 1.0},
            )
            nobody = ScoredBy(teacher_s=0.0, scorer={"host": "bench"})
            cache.add_shard(meta, "0" * 32, sample.arrays, nobody)
        yield folder


def _replayed(root: str, positions: int, rows: int) -> Replayed:
    cache, parts, found, held = Cache.open(root), [], 0, 0
    live, retired = cache.commits(), cache.retired()
    for part, n in sorted(live.items()):
        if part in retired or found >= positions:
            continue
        commit = read_commit(cache.storage, commit_path(part, n))
        parts.append(part)
        found, held = found + commit.positions, held + commit.rows
    if not parts:
        do = "Score some, or leave the root out."
        raise InputError(cache.storage.root, "scored parts", "none", do)
    return Replayed(root=root, parts=tuple(parts), copies=max(1, -(-rows // held)))


def _from_s3(replayed: Replayed) -> FromS3:
    with bench_s3.serving() as s3:
        alone(bench_s3.upload, replayed.root, s3.environment)
        before = s3.requests
        remote = Replayed(
            root=bench_s3.ROOT, parts=replayed.parts, copies=1, environment=s3.environment
        )
        few = replace(replayed, copies=1)
        speed = alone(deliver, remote, _config(few, S3_THREADS))
        return FromS3(threads=S3_THREADS, speed=speed, requests=s3.requests - before)


def as_json(figures: ReplayFigures) -> dict[str, Any]:
    """Plain values."""
    return asdict(figures)


def print_figures(figures: ReplayFigures) -> None:
    """Print tables."""
    say(
        f"{figures.rows:,} rows, {figures.positions:,} positions at K = {figures.topk}"
        f" (parts listed {figures.copies} times); packed positions/s:"
    )
    rows: list[tuple[object, ...]] = [
        _stream_row(
            "Stillroom, all kept" if row.all_kept else "Stillroom",
            row.threads,
            row.first,
            row.later,
        )
        for row in figures.streams
    ]
    if figures.s3:
        rows.append(_stream_row("Stillroom, S3", figures.s3.threads, figures.s3.speed, None))
    print_table(DELIVERED, rows, text=("loader",))
    if figures.s3:
        say(f"S3: {figures.s3.requests:,} requests")
    if figures.peers:
        peers = [_peer(row, figures.default) for row in figures.peers]
        print_table(PEERS, peers, text=("loader",))
    waited = figures.waited
    say(
        f"A trainer of {waited.tokens_s:,.0f} tokens/s waits {waited.share:.2%} of its time over"
        f" {waited.steps:,} steps ({waited.later_share:.2%} after the first {WARM_UP}), and"
        f" {waited.first_batch_s:.2f} s for the first batch"
    )
    for row in figures.resumed:
        say(
            f"Resuming at step {row.step:,}: {row.load_s * 1e3:.1f} ms, and"
            f" {row.first_batch_s:.2f} s to the first batch"
        )


def _stream_row(
    name: str, threads: int, first: Delivered, later: Delivered | None
) -> tuple[object, ...]:
    next_epoch = None if later is None else round(later.positions_s)
    cores, memory = round((later or first).cores, 2), round(first.memory_mb)
    return name, threads, round(first.positions_s), next_epoch, cores, memory


def _peer(row: PeerSpeed, own: Streamed) -> tuple[object, ...]:
    if row.first is None or row.later is None:
        return row.name, row.failed, *[None] * 5
    first, later = row.first.positions_s, row.later.positions_s
    cores, memory = round(row.later.cores, 2), round(row.first.memory_mb)
    ratios = round(own.first.positions_s / first, 1), round(own.later.positions_s / later, 1)
    return row.name, round(first), round(later), cores, memory, *ratios
