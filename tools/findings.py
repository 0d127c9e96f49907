"""What verification found: damage, things to know, and what could not be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stillroom.cache.errors import StillroomError, StorageError
from stillroom.tools.render import say

DAMAGE = (StillroomError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What reading damaged bytes can raise besides our own errors."""
TRANSIENT = (StorageError, MemoryError)
"""What says nothing about the bytes."""

TRY_AGAIN = "Check access and try again."
RESTORE = "Restore the object."

ShardName = tuple[str, int]
"""Part and n of a commit."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one object."""

    object: str
    """Path below the root."""
    problem: str
    do: str = ""
    """What a person can do about it."""
    shard: ShardName | None = None
    """The commit that must not be used because of it, which `--repair` puts into quarantine."""
    damaged: bool = True
    """Whether that commit's own bytes are bad."""


@dataclass(slots=True)
class Report:
    """What verification found. A finding is damage; a note harms no reader."""

    root: str = ""
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)
    """What the storage did not let us read: not known to be damaged, and not verified."""
    repaired: list[Finding] = field(default_factory=list)
    """Commits that were put into quarantine, and what is to be done next."""
    checked: dict[str, int] = field(default_factory=dict)
    """Objects that were read, by kind."""
    read_bytes: int = 0
    """Bytes of shards and rollouts."""
    seconds: float = 0.0

    def find(self, path: str, problem: str, do: str, shard: ShardName | None = None) -> None:
        """Note damage."""
        self.findings.append(Finding(path, problem, do, shard))

    def note(self, path: str, what: str) -> None:
        """Note something that harms no reader."""
        self.notes.append(Finding(path, what))

    def count(self, kind: str, objects: int = 1) -> None:
        """Count objects."""
        self.checked[kind] = self.checked.get(kind, 0) + objects

    def add_bytes(self, size: int) -> None:
        """Count bytes of shards and rollouts."""
        self.read_bytes += size

    def add(self, other: "Report") -> None:
        """Take over what another report holds."""
        for name in ("findings", "notes", "errors", "repaired"):
            getattr(self, name).extend(getattr(other, name))
        for kind, objects in other.checked.items():
            self.count(kind, objects)
        self.read_bytes += other.read_bytes

    @contextmanager
    def watch(self, path: str, shard: ShardName | None = None) -> Iterator[None]:
        """Whatever goes wrong inside is a finding about one object; what follows goes on."""
        try:
            yield
        except TRANSIENT as error:
            self.errors.append(Finding(path, f"{error}", TRY_AGAIN, shard))
        except StillroomError as error:
            place = error.where.rpartition(path)[2].removeprefix(", ")
            problem = f"expected {error.expected}; got {error.got}"
            self.find(path, f"{place}: {problem}" if place else problem, error.do, shard)
        except DAMAGE as error:
            self.find(path, f"cannot be read: {error!r:.400}", RESTORE, shard)


def exit_status(report: Report) -> int:
    """0 clean, 1 damage, also where it was repaired, 2 if something could not be read."""
    if report.findings:
        return 1
    return 2 if report.errors else 0


def print_report(report: Report) -> None:
    """Print one line for each thing that was found, and what was read."""
    for finding in report.findings:
        say(f"{finding.object}: {finding.problem}. {finding.do}")
    for error in report.errors:
        say(f"error: {error.object}: {error.problem}")
    for note in report.notes:
        say(f"note: {note.object}: {note.problem}")
    for repair in report.repaired:
        say(f"repaired: {repair.object}: {repair.problem}. {repair.do}")
    read = ", ".join(f"{count:,} {kind}" for kind, count in report.checked.items())
    amount = f"{report.read_bytes:,} bytes of rollouts and shards"
    say(
        f"{report.root}: read {read or 'nothing'} ({amount}) in {report.seconds:.1f} s: "
        f"{_summary(report)}"
    )


def _summary(report: Report) -> str:
    count = len(report.findings)
    found = f"{count} finding{'' if count == 1 else 's'}" if count else "no findings"
    if report.errors:
        found += f", {len(report.errors)} not verified"
    if report.repaired:
        found += f", repaired: {len(report.repaired)}"
    return found
