"""Verification of a cache: everything is read again, and whatever is wrong becomes a finding.

Nothing is written or repaired.
"""

import time

from stillroom.cache import jsonfile
from stillroom.cache.commits import FILE, Commit, commit_path, read_commit
from stillroom.cache.part import check_rows, policy_of
from stillroom.cache.store import Cache
from stillroom.replay.cycle import Cycle
from stillroom.replay.policies import open_policy, policy_path, policy_versions
from stillroom.tools.findings import DAMAGE, Finding, Report
from stillroom.tools.verify_shard import verify_shard


def verify(cache: Cache) -> Report:
    """Read everything below a root again."""
    start = time.perf_counter()
    report = Report(cache.storage.root)
    live = cache.commits()
    commits = _commits(cache, live, report)
    for part in sorted({*cache.parts(), *live}):
        _rollouts(cache, part, commits.get(part), report)
        if part in commits:
            report.count("shards")
            verify_shard(cache, commits[part], report)
    _snapshots(cache, report)
    _policies(cache, report)
    _small_files(cache, report)
    _attempts(cache, report)
    report.seconds = time.perf_counter() - start
    return report


def _commits(cache: Cache, live: dict[str, int], report: Report) -> dict[str, Commit]:
    """Live commits that can be read."""
    found = {}
    quarantined = {e.path.rsplit("/", 1)[1] for e in cache.storage.list("quarantine")}
    for entry in cache.storage.list("commits"):
        name = entry.path.rsplit("/", 1)[1]
        match = FILE.fullmatch(name)
        if match is None:
            report.find(entry.path, "not a commit's name: expected <part>.<n>.json")
        elif name in quarantined:
            report.notes.append(Finding(entry.path, "quarantined; not read"))
        elif int(match[2]) != live[match[1]]:
            report.find(entry.path, f"a second live commit besides n = {live[match[1]]}")
        else:
            report.count("commits")
            with report.watch(entry.path):
                found[match[1]] = read_commit(cache.storage, entry.path)
    return found


def _rollouts(cache: Cache, part: str, commit: Commit | None, report: Report) -> None:
    path = f"rollouts/{part}.parquet"
    with report.watch(path):
        table, meta, digest = cache.read_part(part)
        report.count("parts")
        report.read_bytes += cache.storage.size(path) or 0
        identity = cache.identity
        same = (meta.tokenizer_fingerprint, meta.vocab_size) == (
            identity.tokenizer_fingerprint,
            identity.vocab_size,
        )
        if meta.name != part or meta.policy_version != policy_of(part) or not same:
            report.find(path, "says that it is another part, or of another tokenizer")
        if commit is not None and digest != commit.rollouts_hash:
            report.find(path, f"expected hash {commit.rollouts_hash} (commit); got {digest}")
        elif commit is None:
            check_rows(table, identity.vocab_size, part)


def _snapshots(cache: Cache, report: Report) -> None:
    for entry in cache.storage.list("snapshots"):
        report.count("snapshots")
        with report.watch(entry.path):
            name = entry.path.removeprefix("snapshots/").removesuffix(".parquet")
            for commit in cache.open_snapshot(name).commits:
                cache.shard(commit)


def _policies(cache: Cache, report: Report) -> None:
    for version in policy_versions(cache.storage):
        report.count("policies")
        with report.watch(policy_path(version)):
            open_policy(cache.storage, version)


def _small_files(cache: Cache, report: Report) -> None:
    """Plans, canaries, drift and marks of retirement must at least parse."""
    for kind in ("units", "canary", "drift", "retired", "quarantine"):
        for entry in cache.storage.list(kind):
            report.count(kind)
            with report.watch(entry.path):
                data = cache.storage.get(entry.path)
                if kind == "units":
                    Cycle.from_json(data, entry.path)
                else:
                    jsonfile.load(data, entry.path)


def _attempts(cache: Cache, report: Report) -> None:
    """Attempts that no commit names: of a scorer that lost or died, or that is still at work."""
    named = set()
    for entry in cache.storage.list("commits"):
        match = FILE.fullmatch(entry.path.rsplit("/", 1)[1])
        if match is not None:
            try:
                commit = read_commit(cache.storage, commit_path(match[1], int(match[2])))
            except DAMAGE:
                continue  # found above, if it is live
            named.add((commit.part, commit.attempt))
    sizes: dict[tuple[str, str], int] = {}
    for entry in cache.storage.list("scores"):
        _, part, attempt, *_ = [*entry.path.split("/"), "", ""]
        sizes[part, attempt] = sizes.get((part, attempt), 0) + entry.size_bytes
    for (part, attempt), size in sizes.items():
        if (part, attempt) not in named:
            path = f"scores/{part}/{attempt}"
            report.notes.append(Finding(path, f"an attempt that is not committed, {size:,} bytes"))
