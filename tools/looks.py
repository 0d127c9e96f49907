"""The commands that look at a cache: their settings, and what each prints. None of them writes, but
for `verify --repair`.

Each returns an exit status: 0, or 1 where `verify` found damage, or 2 where it could not read.
"""

from dataclasses import asdict, dataclass

from tyro.conf import Positional

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from stillroom.tools import findings, listing, show_text, stats_text
from stillroom.tools.render import print_json
from stillroom.tools.repair import repair
from stillroom.tools.show import choose_part, show
from stillroom.tools.stats import collect
from stillroom.tools.texts import open_texts
from stillroom.tools.verify import THREADS, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Look at a whole cache."""

    root: Positional[str]
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    json: bool = False
    """Print JSON."""


class Status(Look):
    """Print who the teacher is, and for every policy its parts, bytes and teacher seconds."""


class Ls(Look):
    """Print one line a part: state, rollouts, positions, bytes, and who scored it when."""


class Stats(Look):
    """Print bytes a position by column, how much of the teacher is kept, and lengths in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify(Look):
    """Read everything again; print one line for each damage, and exit with 1 if there is any."""

    deep: bool = False
    """Decode every number too, and compare it with the rollouts and the format's promises."""
    repair: bool = False
    """Put damaged shards into quarantine, so that their parts can be scored again; deletes
    nothing."""
    part: str | None = None
    """Look at this part only."""
    threads: int = THREADS
    """Parts that are read at once; --deep holds a shard in memory for each."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.threads < 1:
            raise ConfigError("threads", "at least 1", f"{self.threads}", "Raise it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """Print a rollout: its text, where it comes from, and the teacher's scores of each token."""

    root: Positional[str]
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    part: Positional[str | None] = None
    """Name of a part, or the beginning of it; none is the last that is scored and not retired."""
    row: int = 0
    """Which rollout of the part; from 0."""
    position: int | None = None
    """Show this position only, with the teacher's likeliest tokens; from 0. None shows all."""
    top: int = 8
    """Likeliest tokens to show with --position; 1 to K."""
    tokenizer: str | None = None
    """Folder with the cache's tokenizer.json; None takes the first student's or the teacher's."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.row < 0 or self.top < 1 or (self.position is not None and self.position < 0):
            got = f"{self.row}, {self.top} and {self.position}"
            raise ConfigError("row, top, position", "at least 0, 1 and 0", got, "Raise them.")


def run_status(look: Status) -> int:
    """`stillroom status`."""
    cache = Cache.open(look.root)
    if look.json:
        print_json(listing.status_as_json(cache))
    else:
        listing.print_status(cache)
    return 0


def run_ls(look: Ls) -> int:
    """`stillroom ls`."""
    lines = listing.list_parts(Cache.open(look.root))
    if look.json:
        print_json([asdict(line) for line in lines])
    else:
        listing.print_parts(lines)
    return 0


def run_show(look: Show) -> int:
    """`stillroom show`."""
    cache = Cache.open(look.root)
    part = choose_part(cache, look.part)
    texts = open_texts(cache, look.tokenizer)
    shown = show(cache, part, look.row, texts, position=look.position, top=look.top)
    if look.json:
        print_json(asdict(shown))
    else:
        show_text.print_rollout(shown, cache.identity.topk)
    return 0


def run_stats(look: Stats) -> int:
    """`stillroom stats`."""
    value = collect(Cache.open(look.root)).as_json()
    if look.json:
        print_json(value)
    else:
        stats_text.print_stats(value)
    return 0


def run_verify(look: Verify) -> int:
    """`stillroom verify`."""
    cache = Cache.open(look.root)
    report = verify(cache, deep=look.deep, part=look.part, threads=look.threads)
    if look.repair:
        repair(cache, report, deep=look.deep)
    if look.json:
        print_json(asdict(report))
    else:
        findings.print_report(report)
    return findings.exit_status(report)
