"""Verification of a cache: everything that a reader trusts is read again, and whatever is wrong
becomes a finding. Nothing is written.

Plain verification reads every byte and compares hashes. With `deep` it also decodes every number
and compares it with the rollouts and with what `docs/format.md` promises.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from stillroom.cache.commits import Commit
from stillroom.cache.errors import MissingError
from stillroom.cache.id_map import id_map_path
from stillroom.cache.progress import Progress
from stillroom.cache.store import Cache
from stillroom.tools.contents import Contents, find_strangers, list_contents, note_attempts
from stillroom.tools.findings import Report, ShardName
from stillroom.tools.verify_files import CHECKS, verify_file
from stillroom.tools.verify_part import (
    Marks,
    PartReport,
    find_repeated_ids,
    read_marks,
    spare_removed,
    verify_part,
)
from stillroom.tools.verify_snapshots import verify_snapshot

THREADS = min(8, os.cpu_count() or 1)
MEGABYTE = 1_000_000

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class _Run:
    """One verification."""

    cache: Cache
    contents: Contents
    marks: Marks
    report: Report
    threads: int


def verify(
    cache: Cache, *, deep: bool = False, part: str | None = None, threads: int = THREADS
) -> Report:
    """Read everything below a root again, or one part.

    Args:
        cache: the cache.
        deep: decode everything too; holds one shard's object for each thread in memory.
        part: its name; None takes all.
        threads: parts that are read at once.

    Raises:
        MissingError: there is no such part.
    """
    start = time.perf_counter()
    report = Report(cache.storage.root)
    contents = list_contents(cache)
    run = _Run(cache, contents, read_marks(cache, report), report, threads)
    sizes = contents.part_bytes()
    if part is not None and part not in sizes:
        do = "List the parts with 'stillroom ls'."
        raise MissingError(f"part {part}", "rollouts or a commit", "none", do)
    found = _parts(run, sizes if part is None else {part: sizes[part]}, deep=deep)
    report.add(found)
    if found.foreign and not found.commits:
        _blame_identity(report)
    find_repeated_ids(found.rollout_ids, report)
    if part is None:
        _snapshots(run, found.commits)
        _files(run)
        note_attempts(cache, contents, found.attempts, report)
    report.seconds = time.perf_counter() - start
    return report


def _parts(run: _Run, sizes: dict[str, int], *, deep: bool) -> PartReport:
    """Verify parts, given with the bytes that each has."""
    together, done = PartReport(), 0

    def one(part: str) -> PartReport:
        numbers = run.contents.numbers.get(part, ())
        return verify_part(run.cache, part, numbers, run.marks, deep=deep)

    with Progress("verify", sum(sizes.values()) // MEGABYTE, "MB") as progress:
        for part, found in zip(sizes, _each(one, list(sizes), run.threads), strict=True):
            together.add_part(found)
            before, done = done, done + sizes[part]
            progress.advance(done // MEGABYTE - before // MEGABYTE)
    spare_removed(run.cache, [together])
    return together


def _blame_identity(report: Report) -> None:
    """No commit belongs to the identity, so it is the identity that is wrong: no shard is."""
    report.findings = [replace(finding, shard=None) for finding in report.findings]
    do = "Restore it; nothing is repaired before."
    report.find("cache.json", "not the identity under which this cache was scored", do)


def _snapshots(run: _Run, commits: dict[ShardName, Commit]) -> None:
    def one(path: str) -> Report:
        own = Report()
        verify_snapshot(run.cache, path, run.contents, run.marks, commits, own)
        return own

    paths = [entry.path for entry in run.contents.of("snapshots")]
    for found in _each(one, paths, run.threads):
        run.report.add(found)


def _files(run: _Run) -> None:
    find_strangers(run.cache, run.contents, run.report)
    wanted, there = run.cache.identity.id_map, run.contents.of("id_maps")
    if wanted and id_map_path(wanted) not in [entry.path for entry in there]:
        do = "Restore it, or name the same teacher and student to 'stillroom init' again."
        run.report.find(id_map_path(wanted), "the map of the cache's ids is not there", do)

    def one(file: tuple[str, str]) -> Report:
        own = Report()
        verify_file(run.cache, *file, own)
        return own

    files = [(kind, entry.path) for kind in CHECKS for entry in run.contents.of(kind)]
    for found in _each(one, files, run.threads):
        run.report.add(found)


def _each(one: Callable[[Item], Found], items: Sequence[Item], threads: int) -> Iterator[Found]:
    """Apply a function to all items in threads; results in the order of the items."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(one, items)
    finally:
        pool.shutdown(cancel_futures=True)
