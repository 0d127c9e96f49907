"""`stillroom bench`: measures this machine on a cache's own scores, or on made-up ones, and prints
a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from stillroom.tools.render import print_json, print_table, say

if TYPE_CHECKING:
    from stillroom.tools.bench_open import Opening
    from stillroom.tools.bench_store import Figures

STORE_COLUMNS = ("store", "B/position", "write M/s", "read M/s", "of the limit", "random ms")
NOTE = (
    "Stillroom's stores hold every column and check every byte; the others hold six columns and"
    " check none. Hugging Face datasets and litdata unpack a copy before they read at random."
)
OPEN_COLUMNS = ("shards", "first snapshot s", "next s", "open s", "memory MiB", "file MiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Measure stores on the same scores in one run: bytes, writing, reading, and opening against
    the number of shards."""

    what: Positional[Literal["store"]]
    """What to measure."""
    root: Positional[str | None] = None
    """A cache whose scores are used; None makes some up, which is good for speeds only."""
    positions: int = 65_536
    """Scored tokens to measure on, at least; a cache's parts are taken whole."""
    topk: int = 64
    """K of made-up scores."""
    commits: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Numbers of shards to measure opening at; none leaves that out."""
    peers: bool = True
    """Measure other stores too: plain Zarr and Parquet, Hugging Face datasets, and litdata and
    webdataset where they are installed."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.positions, self.topk, *self.commits, 1) < 1:
            got = f"{self.positions}, {self.topk} and {self.commits}"
            raise ConfigError("positions, topk, commits", "at least 1", got, "Raise them.")


def run_bench(job: Bench) -> int:
    """`stillroom bench`."""
    from stillroom.tools import bench_data, bench_open, bench_store

    if job.root is None:
        sample = bench_data.made_up(job.positions, job.topk)
    else:
        sample = bench_data.from_cache(Cache.open(job.root), job.positions)
    figures = bench_store.bench_store(sample, with_peers=job.peers)
    openings = bench_open.bench_open(sample.identity, list(job.commits))
    if job.json:
        source = {"scores": sample.source, "positions": sample.positions}
        stores, opened = bench_store.as_json(figures), bench_open.as_json(openings)
        print_json({**source, "stores": stores, "openings": opened})
        return 0
    say(f"{sample.positions:,} positions at K = {sample.identity.topk}, {sample.source}")
    _stores(figures)
    if job.peers:
        say(NOTE)
    columns = figures[0].columns or {}
    largest = sorted(columns.items(), key=lambda item: -item[1])[:8]
    say("bytes a position, zarr: " + ", ".join(f"{name} {size:.1f}" for name, size in largest))
    if openings:
        _openings(openings)
    return 0


def _stores(figures: "list[Figures]") -> None:
    rows = [
        (
            row.store,
            round(row.bytes_per_position, 1),
            round(row.write_positions_s / 1e6, 3),
            round(row.read_positions_s / 1e6, 3),
            None if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
            None if row.random_ms is None else round(row.random_ms, 3),
        )
        for row in figures
    ]
    print_table(STORE_COLUMNS, rows, text=("store",))


def _openings(openings: "list[Opening]") -> None:
    rows = [
        (
            row.commits,
            round(row.first_s, 3),
            round(row.next_s, 3),
            round(row.open_s, 3),
            round(row.open_mb, 1),
            round(row.snapshot_mb, 2),
        )
        for row in openings
    ]
    print_table(OPEN_COLUMNS, rows)
