"""Settings of replay: sizes, order, memory, which rows, and how a growing cache is followed."""

import math
import os
from dataclasses import dataclass, field

from stillroom.cache.errors import ConfigError
from stillroom.cache.schema import USER_NAME
from stillroom.replay.place import LAST_BATCHES
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import OVER_LONG

AT_EPOCH_END = -1
MAX_THREADS = 8
LEAST = {
    "batch_rows": 1,
    "max_tokens": 1,
    "block_rows": 1,
    "window_rows": 1,
    "group_rows": 1,
    "cached_bytes": 1,
    "ahead_bytes": 1,
    "threads": 0,
    "follow_every_steps": AT_EPOCH_END,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How cached rows come to a trainer."""

    batch_rows: int = 64
    """B, rows of a step over all ranks; 1 to the rows that are replayed."""
    max_tokens: int = 8192
    """Tokens of a packed micro-batch; >= 1."""
    over_long: str = "refuse"
    """Rows of more than max_tokens tokens: refuse, skip, or truncate."""
    last_batch: str = "keep"
    """Rows at an epoch's end that fill no batch: keep (a short one), drop, or carry (filled up from
    the next epoch; the only choice for several caches)."""
    block_rows: int = 32
    """Neighbouring rows that are read and shuffled together; >= 1."""
    window_rows: int = 64
    """Rows of a lane that are shuffled among themselves; >= 1. About lanes (at most 64) times
    window_rows + 2 block_rows rows are in use at once over all ranks; a rank that needs more of
    them than cached_bytes holds reads its blocks again and again."""
    group_rows: int = 1
    """Rollouts of one prompt that stay together in every step, at most; 1 takes rows one by one.
    Divides batch_rows."""
    share_prompts: bool | None = None
    """Whether the rollouts of a group go through the student with their prompt once; takes
    group_rows above 1. If nothing is said, training does so on a CPU in float32, where it is known
    to be faster, and gradients to be the same to 1e-5; a stream by itself does not."""
    even_ranks: bool = False
    """Whether a step's rows are dealt to ranks by length, so that all are done at the same time. A
    rank then decodes blocks of every lane, where it would read its own lanes only."""
    cached_bytes: int = 1 << 30
    """Decoded blocks kept in memory, bytes."""
    ahead_bytes: int = 256 << 20
    """Packed batches kept ready, bytes; one at least is. Page-locked ones, for a GPU, take up to
    twice as much: torch rounds each array up to a power of two, and keeps its memory."""
    threads: int = 0
    """Threads that read and decode; 0 for one a core, 8 at most, and 16 on an object store."""
    rows: RowFilter = field(default_factory=RowFilter)
    """Which rows are replayed."""
    weight_column: str | None = None
    """User column (`x_...`) with a weight >= 0 for each row or each position, which its loss is
    multiplied by; what a step's loss is divided by counts every scored token once all the same."""
    lag_half_life: float | None = None
    """A row whose policy is this many versions behind the newest one of the snapshot comes in half
    of the epochs, one twice as far behind in a quarter, and one of an unknown policy in all;
    nothing: all rows come in every epoch. A step takes no more rows (or groups) than come in an
    epoch on average."""
    follow_every_steps: int = 0
    """Steps after which newer commits are looked for; 0 never, -1 at every epoch's end. Newer ones
    begin a new epoch."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in LEAST.items():
            _check(name, getattr(self, name) >= least, f"at least {least}", getattr(self, name))
        _check("over_long", self.over_long in OVER_LONG, f"one of {OVER_LONG}", self.over_long)
        names = f"one of {LAST_BATCHES}"
        _check("last_batch", self.last_batch in LAST_BATCHES, names, self.last_batch)
        fits = self.batch_rows % self.group_rows == 0
        _check("batch_rows", fits, f"a multiple of group_rows, {self.group_rows}", self.batch_rows)
        grouped = self.group_rows > 1 or not self.share_prompts
        _check("share_prompts", grouped, "group_rows above 1", self.group_rows)
        half = self.lag_half_life
        valid = half is None or 0 < half < math.inf
        _check("lag_half_life", valid, "a finite number above 0", half)
        column = self.weight_column
        valid = column is None or USER_NAME.fullmatch(column) is not None
        _check("weight_column", valid, "the name of a user column, x_...", column)

    def read_threads(self, remote: bool) -> int:
        """Threads that read and decode."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.threads or (2 * MAX_THREADS if remote else min(MAX_THREADS, cores or 1))


def _check(name: str, valid: bool, expected: str, got: object) -> None:
    if not valid:
        raise ConfigError(f"replay.{name}", expected, repr(got), "Change the setting.")
