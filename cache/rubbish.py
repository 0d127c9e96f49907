"""Rubbish: what `gc` may remove from a cache, and why, from a listing of what is there.

Nothing is rubbish before it is 24 hours old by the storage's clock, but for claims of parts that
are scored: they go after a minute. Commits, quarantine, marks of retirement, the identity,
snapshots, policies, canaries and plans never are rubbish.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stillroom.cache.claims import DEAD_AFTER_S
from stillroom.cache.clock import HOUR_S
from stillroom.cache.commits import Commit
from stillroom.cache.pins import Pin, Pinned
from stillroom.cache.storage import Entry

ShardName = tuple[str, int]
"""Part and n of a commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubbish:
    """Objects that go together."""

    kind: str
    """attempt, shard, rollouts, claim, pin, probe, temporary or tombstone."""
    paths: tuple[str, ...]
    size_bytes: int
    reason: str
    part: str | None = None
    n: int | None = None
    """Commit whose bytes they are, for a shard."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What would be rubbish but for one thing."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a cache holds at one moment, as far as rubbish is concerned."""

    now: float
    """Seconds since the epoch by the storage's clock."""
    min_age_s: float
    attempts: dict[str, dict[str, list[Entry]]]
    """Objects by part and attempt; not of live parts with one attempt and one commit."""
    commits: dict[str, dict[int, Commit]]
    """By part and n, for those parts."""
    unreadable: dict[str, str]
    """Parts with a commit that cannot be read, and why."""
    numbers: dict[str, list[int]]
    """Every n of a part's commits, those in quarantine too."""
    named: dict[str, str]
    """Attempts that stored snapshots name, and the id of one; not looked up where every attempt
    has its commit."""
    unnamed: str | None
    """Why it is not known what else snapshots name, if it is not."""
    live: dict[str, int]
    retired: dict[str, Entry]
    quarantine: dict[ShardName, Entry]
    tombstones: dict[ShardName, list[Entry]]
    pinned: Pinned
    pins: list[Pin]
    rollouts: dict[str, Entry]
    claims: dict[str, Entry]
    probes: list[Entry]
    temporaries: list[Entry]

    def old(self, entries: Iterable[Entry]) -> bool:
        """Whether all of some objects are old enough."""
        return all(self.now - entry.modified >= self.min_age_s for entry in entries)

    def hours(self, entries: Iterable[Entry]) -> str:
        """Age of the newest of some objects."""
        return _hours(self.now - max(entry.modified for entry in entries))


def find_rubbish(listing: Listing) -> Iterator[Rubbish | Kept]:
    """All that may be removed, and what is kept for a reason."""
    for part in sorted(listing.attempts):
        yield from _attempts(listing, part)
        yield from _shards(listing, part)
    for part in sorted(listing.rollouts.keys() & listing.retired.keys()):
        yield from _rollouts(listing, part)
    yield from _claims(listing)
    yield from _pins(listing)
    yield from _aged(listing, "probe", listing.probes, "left by a check of the storage")
    yield from _aged(listing, "temporary", listing.temporaries, "left by a writer that died")


def _attempts(listing: Listing, part: str) -> Iterator[Rubbish | Kept]:
    if part in listing.unreadable:
        yield Kept(f"attempts of part {part}", listing.unreadable[part])
        return
    committed = {commit.attempt for commit in listing.commits.get(part, {}).values()}
    for attempt, entries in sorted(listing.attempts[part].items()):
        if attempt in committed or not listing.old(entries):
            continue
        keeper = _lost_commit(listing, part, attempt, entries)
        if keeper is not None:
            yield Kept(f"attempt {attempt} of part {part}", keeper)
        else:
            reason = f"no commit names it, and it is {listing.hours(entries)} old"
            yield _rubbish("attempt", entries, reason, part)


def _lost_commit(listing: Listing, part: str, attempt: str, entries: list[Entry]) -> str | None:
    """Why an attempt that no commit names may have had one, or None. The manifest is put last, so
    one that has it lacks only its commit."""
    if attempt in listing.named:
        return f"snapshot {listing.named[attempt]} names it, but its commit is gone: restore that"
    if not any(entry.path.endswith("/manifest.json") for entry in entries):
        return None
    if not listing.numbers:
        return "the cache has no commit at all: restore commits/, or score a part first"
    if part not in listing.live:
        retired = listing.retired.get(part)
        if retired is None:
            return "it is whole, and its part has no live commit: restore that, or score it first"
        if not listing.old([retired]):
            return f"it is whole, and its part was retired only {listing.hours([retired])} ago"
    return listing.unnamed


def _shards(listing: Listing, part: str) -> Iterator[Rubbish | Kept]:
    for n, commit in sorted(listing.commits.get(part, {}).items()):
        entries = listing.attempts[part].get(commit.attempt, [])
        reason = _out_of_use(listing, part, n)
        if not entries or reason is None:
            continue
        keeper = listing.pinned.keeper((part, n))
        if keeper is None:
            yield _rubbish("shard", entries, reason, part, n)
            continue
        yield Kept(f"shard {part}.{n}", keeper)
        stones = listing.tombstones.get((part, n), [])
        whole = sum(entry.size_bytes for entry in entries) == commit.stored_bytes
        if stones and whole and listing.old(stones):
            yield _rubbish("tombstone", stones, "its gc died, and the bytes are all there", part, n)


def _out_of_use(listing: Listing, part: str, n: int) -> str | None:
    """Why nobody needs the bytes of a commit any more."""
    retired, aside = listing.retired.get(part), listing.quarantine.get((part, n))
    live = listing.live.get(part)
    if retired is not None and listing.old([retired]):
        return f"its part was retired {listing.hours([retired])} ago"
    if aside is not None and listing.old([aside]) and live is not None:
        return f"put into quarantine {listing.hours([aside])} ago; commit {live} took its place"
    return None


def _rollouts(listing: Listing, part: str) -> Iterator[Rubbish | Kept]:
    mark = listing.retired[part]
    if not listing.old([mark]):
        return
    keepers = (listing.pinned.keeper((part, n)) for n in listing.numbers.get(part, ()))
    keeper = next((keeper for keeper in keepers if keeper is not None), None)
    if keeper is not None:
        yield Kept(f"rollouts {part}", keeper)
        return
    reason = f"its part was retired {listing.hours([mark])} ago"
    yield _rubbish("rollouts", [listing.rollouts[part]], reason, part)


def _claims(listing: Listing) -> Iterator[Rubbish]:
    for part, entry in sorted(listing.claims.items()):
        if listing.old([entry]):
            reason = f"not renewed for {listing.hours([entry])}"
            yield _rubbish("claim", [entry], reason, part)
        elif part in listing.live and listing.now - entry.modified >= DEAD_AFTER_S:
            yield _rubbish("claim", [entry], "its part is scored", part)


def _pins(listing: Listing) -> Iterator[Rubbish]:
    for pin in listing.pins:
        ago = listing.now - pin.expires
        if ago >= listing.min_age_s:
            reason = f"expired {_hours(ago)} ago"
            yield Rubbish(kind="pin", paths=(pin.path,), size_bytes=0, reason=reason)


def _aged(listing: Listing, kind: str, entries: Iterable[Entry], reason: str) -> Iterator[Rubbish]:
    for entry in entries:
        if listing.old([entry]):
            yield _rubbish(kind, [entry], f"{reason} {listing.hours([entry])} ago")


def _rubbish(
    kind: str, entries: list[Entry], reason: str, part: str | None = None, n: int | None = None
) -> Rubbish:
    return Rubbish(
        kind=kind,
        paths=tuple(entry.path for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
        reason=reason,
        part=part,
        n=n,
    )


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR_S:,.0f} h"
