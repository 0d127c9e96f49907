"""Repair of what verification found: damaged shards go into quarantine, so that their parts can be
scored again. Nothing is deleted."""

from stillroom.cache.commits import commit_path, list_numbers
from stillroom.cache.part import policy_of
from stillroom.cache.store import Cache, retired_path
from stillroom.cache.tombstones import removed_commits
from stillroom.tools.findings import Finding, Report, ShardName
from stillroom.tools.object_names import rollouts_path
from stillroom.tools.verify_part import PartReport, read_part_marks, spare_removed, verify_part

MAX_REASON = 500


def repair(cache: Cache, report: Report, *, deep: bool) -> None:
    """Put into quarantine what is damaged, part by part, each right after it was verified once
    more: another process may have repaired it, and a failing disk may have lied.

    Args:
        cache: the cache.
        report: what verification found; takes what was done.
        deep: verify as thoroughly as before.
    """
    condemned: dict[str, set[ShardName]] = {}
    for finding in report.findings:
        if finding.shard is not None:
            condemned.setdefault(finding.shard[0], set()).add(finding.shard)
    removed = removed_commits(cache.storage) if condemned else set()
    for part, shards in sorted(condemned.items()):
        again = _verify_again(cache, part, removed, deep=deep)
        spare_removed(cache, [again])
        _set_aside(cache, part, shards, again, report)


def _verify_again(cache: Cache, part: str, removed: set[ShardName], *, deep: bool) -> PartReport:
    marked, numbers = Report(), _numbers(cache, part)
    marks = read_part_marks(cache, part, numbers, removed, marked)
    found = verify_part(cache, part, numbers, marks, deep=deep)
    found.add(marked)
    return found


def _set_aside(
    cache: Cache, part: str, shards: set[ShardName], again: Report, report: Report
) -> None:
    """Put into quarantine those of a part's shards that the second look found bad."""
    rollouts = any(finding.object == rollouts_path(part) for finding in again.findings)
    for name in sorted(shards):
        path = commit_path(*name)
        findings = [finding for finding in again.findings if finding.shard == name]
        if any(error.shard in (name, None) for error in again.errors):
            report.errors.append(Finding(path, "not repaired: it cannot be read now", "Try again."))
        elif not findings:
            report.note(path, "not repaired: when it was read again nothing was wrong")
        else:
            damaged = any(finding.damaged for finding in findings)
            reason = f"{findings[0].object}: {findings[0].problem}"[:MAX_REASON]
            cache.quarantine(part, reason, damaged=damaged, n=name[1])
            report.repaired.append(
                Finding(path, "put into quarantine", _next(cache, part, rollouts))
            )


def _next(cache: Cache, part: str, rollouts_damaged: bool) -> str:
    if cache.storage.exists(retired_path(part)):
        return "Its part is retired: there is nothing else to do."
    if cache.is_scored(part):
        return "Its part has another shard: there is nothing else to do."
    if rollouts_damaged:
        return (
            f"Its rollouts are damaged too: restore {rollouts_path(part)}, or retire the part; it"
            " cannot be scored again."
        )
    return "Run 'stillroom score', which scores its part again."


def _numbers(cache: Cache, part: str) -> list[int]:
    """Every n of a part's commits, from a new listing."""
    return list_numbers(cache.storage, f"commits/v{policy_of(part):06d}").get(part, [])
