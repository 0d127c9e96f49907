"""What a stream refuses before its first batch: ranks, caches and batches that do not fit."""

from collections.abc import Sequence

from stillroom.cache.errors import ConfigError, InputError, MismatchError
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Feed, Source


def check_stride(stride: int, config: StreamConfig) -> None:
    """Refuse strides that cannot be taken."""
    if stride < 1 or (stride > 1 and config.follow_every_steps):
        got, do = f"{stride}", "Set replay.follow_every_steps to 0, or stride to 1."
        raise ConfigError("stride", "at least 1, and 1 where a cache is followed", got, do)


def check_ranks(rank: int, world: int) -> None:
    """Refuse a rank outside the world."""
    if not 0 <= rank < world:
        do = "Check how the job was launched."
        raise ConfigError("rank", f"0 to {world - 1}", f"{rank}", do)


def check_sources(sources: Sequence[Source], config: StreamConfig, vocab_size: int | None) -> None:
    """Refuse empty snapshots, and caches whose tokens or temperatures differ."""
    if not sources:
        raise ConfigError("sources", "a cache at least", "none", "Name one.")
    for source in sources:
        if not source.snapshot.rows:
            do = "Roll out and score first, or widen the policies that are replayed."
            where = source.cache.storage.root
            raise InputError(where, "rows to replay", "an empty snapshot", do)
    first = sources[0].cache.identity
    if vocab_size not in (None, first.vocab_size):
        where, do = sources[0].cache.storage.root, "Choose a student with the teacher's tokenizer."
        raise MismatchError(where, f"a vocabulary of {vocab_size}", f"{first.vocab_size}", do)
    for source in sources[1:]:
        for name in ("tokenizer_fingerprint", "vocab_size", "temperature"):
            own, other = getattr(first, name), getattr(source.cache.identity, name)
            if own != other:
                do = "Mix caches of one tokenizer and temperature."
                where = source.cache.storage.root
                raise MismatchError(where, f"{name} = {own!r}", f"{other!r}", do)
    if len(sources) > 1 and (config.last_batch != "carry" or config.follow_every_steps < 0):
        got = f"{config.last_batch} and {config.follow_every_steps}"
        expected = "carry, and no epoch's end to follow at, for several caches"
        do = "Their epochs end at different steps: change the settings."
        raise ConfigError("replay.last_batch, follow_every_steps", expected, got, do)


def check_batch(feeds: Sequence[Feed], config: StreamConfig) -> None:
    """Refuse a step of more rows, or groups, than are replayed."""
    units = sum(feed.units for feed in feeds)
    wanted = config.batch_rows // config.group_rows
    kind = "rows" if config.group_rows == 1 else f"groups of up to {config.group_rows} rows"
    if wanted > units:
        do = "Lower replay.batch_rows, or replay more."
        raise InputError("replay.batch_rows", f"at most the {units} {kind}", f"{wanted}", do)
    if config.lag_half_life is not None:
        _check_lag(feeds, wanted, kind)


def _check_lag(feeds: Sequence[Feed], wanted: int, kind: str) -> None:
    """Refuse a half-life that leaves less than a step of an epoch, or of a cache less than one row
    or group."""
    found = [float(feed.expected_units) for feed in feeds]
    if sum(found) < wanted or min(found) < 1:
        few = feeds[found.index(min(found))]
        where = f"{few.source.cache.storage.root}, replay.lag_half_life"
        expected = f"{wanted} or more {kind} in an epoch on average, and of each cache 1"
        numbers = ", ".join(f"{one:.3g}" for one in found)
        got = f"{numbers}, where policy {few.selection.newest_policy} is the newest"
        do = "Raise it, lower replay.batch_rows, or replay rows of newer policies."
        raise InputError(where, expected, got, do)
