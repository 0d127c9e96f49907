"""Stored snapshots verified: each must be the list of its name, of commits that are there."""

from collections.abc import Mapping

from stillroom.cache.commits import Commit, commit_path
from stillroom.cache.snapshot import read_snapshot
from stillroom.cache.store import Cache
from stillroom.tools.contents import Contents
from stillroom.tools.findings import Report, ShardName
from stillroom.tools.verify_part import Marks

DO = "Make a new snapshot, and remove this one."


def verify_snapshot(
    cache: Cache,
    path: str,
    contents: Contents,
    marks: Marks,
    commits: Mapping[ShardName, Commit],
    report: Report,
) -> None:
    """Verify one snapshot.

    Args:
        cache: the cache.
        path: the snapshot's object.
        contents: what else is there.
        marks: which commits are out of use: a snapshot that names one does not open any more, which
            is as it should be.
        commits: those that can be read.
        report: takes what is found.
    """
    report.count("snapshots")
    with report.watch(path):
        name = path.removeprefix("snapshots/").removesuffix(".parquet")
        for commit in read_snapshot(cache.storage, name).commits:
            _check(cache, path, commit, contents, marks, commits, report)


def _check(
    cache: Cache,
    path: str,
    commit: Commit,
    contents: Contents,
    marks: Marks,
    commits: Mapping[ShardName, Commit],
    report: Report,
) -> None:
    name = (commit.part, commit.n)
    own = commit_path(*name)
    if name in marks.damaged or name in marks.removed:
        state = "damaged" if name in marks.damaged else "removed"
        report.note(path, f"does not open any more: the bytes of {own} are {state}")
    elif commit.n not in contents.numbers.get(commit.part, ()):
        if not cache.storage.exists(own):  # it may be younger than the listing
            report.find(own, f"is not there, but {path} names it", "Restore it.")
    elif name in commits and commits[name] != commit:
        report.find(path, f"holds another {own} than the one that is there", DO)
