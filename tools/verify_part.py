"""One part verified: its rollouts, its commits, and the shards that they name."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from stillroom.cache.check_rows import check_rows
from stillroom.cache.commits import Commit, commit_path, first_free, read_commit
from stillroom.cache.errors import MissingError, StillroomError
from stillroom.cache.quarantine import (
    decode_quarantine,
    get_quarantine,
    list_quarantine,
    quarantine_path,
)
from stillroom.cache.store import Cache, retired_path
from stillroom.cache.tombstones import removed_commits
from stillroom.tools.findings import Finding, Report, ShardName
from stillroom.tools.object_names import rollouts_path
from stillroom.tools.verify_shard import Rollouts, verify_shard


@dataclass(frozen=True, slots=True)
class Marks:
    """What says that commits or parts are out of use."""

    aside: Collection[ShardName]
    """Commits in quarantine, for whatever reason."""
    damaged: Collection[ShardName]
    """Those that were found bad."""
    removed: Collection[ShardName]
    """Commits whose bytes `gc` removed."""
    retired: Collection[str]
    """Parts."""


@dataclass(slots=True)
class PartReport(Report):
    """What verification of a part found."""

    commits: dict[ShardName, Commit] = field(default_factory=dict)
    """Its commits that can be read."""
    attempts: set[tuple[str, str]] = field(default_factory=set)
    """Part and attempt of every commit that can be read, in quarantine too."""
    foreign: int = 0
    """Commits of another identity."""
    rollout_ids: dict[str, np.ndarray] = field(default_factory=dict)
    """Ids of the rollouts of each part that is not retired."""
    of_shards: dict[ShardName, list[Finding]] = field(default_factory=dict)
    """Those of the findings that are about a shard's own bytes."""

    def add_part(self, other: "PartReport") -> None:
        """Take over what was found in another part."""
        self.add(other)
        self.commits |= other.commits
        self.attempts |= other.attempts
        self.foreign += other.foreign
        self.rollout_ids |= other.rollout_ids
        self.of_shards |= other.of_shards


def read_marks(cache: Cache, report: Report) -> Marks:
    """List the marks. List commits first: what is quarantined later shows here."""
    files = get_quarantine(cache.storage, sorted(list_quarantine(cache.storage)))
    damaged = _damaged(cache, files, report)
    return Marks(files.keys(), damaged, removed_commits(cache.storage), cache.retired())


def read_part_marks(
    cache: Cache,
    part: str,
    numbers: Collection[int],
    removed: Collection[ShardName],
    report: Report,
) -> Marks:
    """Read the marks of one part again, without a look at those of others.

    Args:
        cache: the cache.
        part: its name.
        numbers: every n of which there is a commit.
        removed: commits whose bytes `gc` removed.
        report: takes marks that cannot be read.
    """
    found = get_quarantine(cache.storage, [(part, n) for n in numbers])
    files = {name: data for name, data in found.items() if not isinstance(data, MissingError)}
    retired = {part} if cache.storage.exists(retired_path(part)) else set()
    return Marks(files.keys(), _damaged(cache, files, report), removed, retired)


def _damaged(
    cache: Cache, files: Mapping[ShardName, bytes | StillroomError], report: Report
) -> set[ShardName]:
    damaged = set()
    for name, data in files.items():
        with report.watch(quarantine_path(*name)):
            if decode_quarantine(cache.storage, name, data).damaged:
                damaged.add(name)
    return damaged


def verify_part(
    cache: Cache, part: str, numbers: Collection[int], marks: Marks, *, deep: bool
) -> PartReport:
    """Verify a part; `spare_removed` is to follow.

    Args:
        cache: the cache.
        part: its name.
        numbers: every n of which there is a commit.
        marks: what is out of use.
        deep: decode everything.
    """
    report = PartReport()
    found = _rollouts(cache, part, report)
    if found is not None and part not in marks.retired:
        report.rollout_ids[part] = found.table["rollout_id"].to_numpy()
    for n in sorted(numbers):
        name, path = (part, n), commit_path(part, n)
        if name in marks.damaged:
            report.note(path, "in quarantine as damaged; not verified")
            with suppress(StillroomError):
                report.attempts.add((part, read_commit(cache.storage, path).attempt))
            continue
        report.count("commits")
        with report.watch(path, name):
            commit = read_commit(cache.storage, path)
            report.attempts.add((part, commit.attempt))
            if commit.identity == cache.identity.digest():
                report.commits[name] = commit
            else:
                report.foreign += 1
                problem = f"of the identity {commit.identity}, not of this cache's"
                do = "Restore the commit or cache.json, whichever is wrong; --repair leaves both."
                report.find(path, problem, do)
    _check_live(part, numbers, marks, report)
    for name, commit in report.commits.items():
        own = _of_commit(commit, found, report)
        if name in marks.removed:
            report.note(commit_path(*name), "its bytes were removed by gc")
        else:
            _verify_shard(cache, commit, own, marks, report, deep=deep)
    if found is not None and not report.commits:
        _check_rows(cache, part, found, report)
    return report


def spare_removed(cache: Cache, reports: Iterable[PartReport]) -> None:
    """Turn findings about shards whose bytes `gc` has removed since the marks were read into notes;
    one look at the marks for all parts."""
    damaged = [report for report in reports if report.of_shards]
    removed = removed_commits(cache.storage) if damaged else set()
    for report in damaged:
        for name in sorted(report.of_shards.keys() & removed):
            gone = report.of_shards.pop(name)
            report.findings = [finding for finding in report.findings if finding not in gone]
            report.note(commit_path(*name), "its bytes are being removed by gc")


def find_repeated_ids(rollout_ids: Mapping[str, np.ndarray], report: Report) -> None:
    """No two rollouts have the same id; says so once of each part whose ids an earlier one has.

    Args:
        rollout_ids: (rows,) uint64 of each part.
        report: takes what is found.
    """
    parts = list(rollout_ids)
    ids = np.concatenate([np.empty(0, np.uint64), *rollout_ids.values()])
    part = np.repeat(np.arange(len(parts)), [len(own) for own in rollout_ids.values()])
    _, first, at = np.unique(ids, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[at] != np.arange(len(ids)))
    for number in np.unique(part[repeated]).tolist():
        own = repeated[part[repeated] == number]
        earlier = parts[part[first[at[own[0]]]]]
        problem = f"{len(own)} rollout ids that others have, {ids[own[0]]} in {earlier} too"
        report.find(rollouts_path(parts[number]), problem, "Retire one of the parts.")


def _rollouts(cache: Cache, part: str, report: Report) -> Rollouts | None:
    path = rollouts_path(part)
    with report.watch(path):
        try:
            found = Rollouts(*cache.read_part(part))
        except MissingError:
            if not cache.storage.exists(f"retired/{part}.json"):
                do = "Its scores can be used; to score it again, restore the rollouts."
                report.find(path, "is not there, but the part has a commit", do)
            return None
        report.count("parts")
        report.add_bytes(cache.storage.size(path) or 0)
        return found
    return None


def _check_live(part: str, numbers: Collection[int], marks: Marks, report: PartReport) -> None:
    """At most one commit is out of quarantine, and all before it are in it. Which of two is to go
    is for a person to say where one is of another identity."""
    live = first_free(part, marks.aside)
    others = sorted(n for n in numbers if n != live and (part, n) not in marks.aside)
    for n in others:
        path = commit_path(part, n)
        if live not in numbers:
            problem = f"not live: commit {live} is neither there nor in quarantine"
            report.find(path, problem, f"Restore {commit_path(part, live)}, or its mark.")
            continue
        problem = f"a second live commit besides n = {live}, which readers take"
        shard = None if report.foreign else (part, n)
        do = "Put it into quarantine, as --repair does."
        if report.foreign:
            do = "Keep the one that belongs to cache.json."
        report.findings.append(Finding(path, problem, do, shard, damaged=False))


def _of_commit(commit: Commit, found: Rollouts | None, report: Report) -> Rollouts | None:
    """The rollouts, if they are those that a commit's shard was made from."""
    if found is None or found.hash == commit.rollouts_hash:
        return found
    problem = f"expected hash {commit.rollouts_hash} (commit {commit.n}); got {found.hash}"
    do = "Its scores can be used; restore the rollouts that they belong to."
    report.find(rollouts_path(commit.part), problem, do)
    return None


def _check_rows(cache: Cache, part: str, found: Rollouts, report: Report) -> None:
    """Rollouts that are still to be scored must be fit for it."""
    identity = cache.identity
    with report.watch(rollouts_path(part)):
        check_rows(
            found.table, identity.vocab_size, part, identity.max_length, identity.student_extra
        )


def _verify_shard(
    cache: Cache,
    commit: Commit,
    rollouts: Rollouts | None,
    marks: Marks,
    report: PartReport,
    *,
    deep: bool,
) -> None:
    name, own = (commit.part, commit.n), Report()
    own.count("shards")
    verify_shard(cache, commit, rollouts, own, deep=deep)
    if name in marks.aside:
        do = "It is out of use: make snapshots that name it anew; gc removes it."
        own.findings = [replace(finding, do=do, shard=None) for finding in own.findings]
    if own.findings:
        report.of_shards[name] = own.findings
    report.add(own)
