"""What verification found.

A *finding* is damage; a *note* is something to know that harms no reader, such as an attempt that
was never committed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stillroom.cache.errors import StillroomError
from stillroom.tools.render import say

# What reading damaged bytes can raise besides our own errors.
DAMAGE = (StillroomError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one object."""

    object: str
    """Path below the root."""
    problem: str


@dataclass(slots=True)
class Report:
    """What verification found."""

    root: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    """Objects that were read, by kind."""
    read_bytes: int = 0
    """Bytes of shards and rollouts."""
    seconds: float = 0.0

    def find(self, path: str, problem: str) -> None:
        """Note damage."""
        self.findings.append(Finding(path, problem))

    def count(self, kind: str) -> None:
        """Count an object."""
        self.checked[kind] = self.checked.get(kind, 0) + 1

    @contextmanager
    def watch(self, path: str) -> Iterator[None]:
        """Whatever goes wrong inside is a finding about one object; what follows goes on."""
        try:
            yield
        except StillroomError as error:
            place = "" if error.where.endswith(path) else f"{error.where}: "
            self.find(path, f"{place}expected {error.expected}; got {error.got}")
        except DAMAGE as error:
            self.find(path, f"cannot be read: {error!r}")


def print_report(report: Report) -> None:
    """Print one line a finding, one a note, and what was read."""
    for finding in report.findings:
        say(f"{finding.object}: {finding.problem}")
    for note in report.notes:
        say(f"note: {note.object}: {note.problem}")
    read = ", ".join(f"{count:,} {kind}" for kind, count in report.checked.items())
    count = len(report.findings)
    found = f"{count} finding{'' if count == 1 else 's'}" if count else "no findings"
    say(
        f"{report.root}: read {read or 'nothing'} ({report.read_bytes:,} bytes of rollouts and "
        f"shards) in {report.seconds:.1f} s: {found}"
    )
