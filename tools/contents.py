"""What lies below a root, by kind, and what should not lie there."""

from collections.abc import Collection
from dataclasses import dataclass, field

from stillroom.cache import jsonfile
from stillroom.cache.commits import FILE
from stillroom.cache.shard_format import shard_format
from stillroom.cache.storage_entry import Entry
from stillroom.cache.store import Cache
from stillroom.tools.findings import Report
from stillroom.tools.object_names import kind_of

REMOVE = "No reader looks at it: remove it, or move it out of the root."
COPIED = ("canary", "units", "drift")
"""Kinds of which no two files can be equal."""


@dataclass(slots=True)
class Contents:
    """What lies below a root."""

    by_kind: dict[str, list[Entry]] = field(default_factory=dict)
    strangers: list[Entry] = field(default_factory=list)
    """What no cache holds."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """Every n of each part's commits."""

    def of(self, kind: str) -> list[Entry]:
        """Objects of one kind."""
        return self.by_kind.get(kind, [])

    def part_bytes(self) -> dict[str, int]:
        """Every part that has rollouts or a commit, by name, and the bytes to read for it."""
        sizes = dict.fromkeys(self.numbers, 0)
        for entry in self.of("rollouts"):
            sizes[_part_of(entry)] = sizes.get(_part_of(entry), 0) + entry.size_bytes
        for entry in self.of("scores"):
            if _part_of(entry) in sizes:
                sizes[_part_of(entry)] += entry.size_bytes
        return dict(sorted(sizes.items()))


def list_contents(cache: Cache) -> Contents:
    """List everything below a root."""
    shard_object = shard_format(cache.identity.shard_format).object_name
    contents = Contents()
    for entry in cache.storage.list_all():
        kind = kind_of(entry.path, shard_object)
        if kind is None:
            contents.strangers.append(entry)
            continue
        contents.by_kind.setdefault(kind, []).append(entry)
        match = FILE.fullmatch(entry.path.rsplit("/", 1)[1]) if kind == "commits" else None
        if match is not None:
            contents.numbers.setdefault(match[1], []).append(int(match[2]))
    return contents


def find_strangers(cache: Cache, contents: Contents, report: Report) -> None:
    """Objects that no cache holds, and copies under another name."""
    for entry in contents.strangers:
        report.find(entry.path, "no object of a cache has this name", REMOVE)
    for kind in COPIED:
        first: dict[str, str] = {}
        for entry in contents.of(kind):
            with report.watch(entry.path):
                digest = jsonfile.digest(cache.storage.get(entry.path))
                if first.setdefault(digest, entry.path) != entry.path:
                    report.find(entry.path, f"a copy of {first[digest]}", REMOVE)


def note_attempts(
    cache: Cache, contents: Contents, named: Collection[tuple[str, str]], report: Report
) -> None:
    """Attempts that no commit names: of a scorer that lost or died, or that is still at work.

    Args:
        cache: the cache.
        contents: what lies in it.
        named: part and attempt of every commit.
        report: takes a note of each.
    """
    sizes: dict[tuple[str, str], int] = {}
    for entry in contents.of("scores"):
        _, part, attempt, name = entry.path.split("/")
        if (part, attempt) in named:
            continue
        sizes[part, attempt] = sizes.get((part, attempt), 0) + entry.size_bytes
        if name == "manifest.json":
            _check_copy(cache, entry.path, part, attempt, report)
    for (part, attempt), size in sizes.items():
        what = f"an attempt that no commit names, {size:,} bytes"
        report.note(f"scores/{part}/{attempt}", what)


def _check_copy(cache: Cache, path: str, part: str, attempt: str, report: Report) -> None:
    where = cache.storage.describe(path)
    with report.watch(path):
        value = jsonfile.load(cache.storage.get(path, jsonfile.MAX_BYTES), where)
        says = value.get("part"), value.get("attempt")
        if says != (part, attempt):
            report.find(path, f"says that it is of {says!r:.200}", REMOVE)


def _part_of(entry: Entry) -> str:
    return entry.path.split("/")[1].removesuffix(".parquet")
