"""`stillroom doctor`: tries a root before a job, and says in one line each what works, what does
not, and what to do about it."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from tyro.conf import Positional

from stillroom.cache.errors import ConfigError
from stillroom.cache.storage import Storage
from stillroom.tools.doctor_cache import check_claims, check_identity
from stillroom.tools.doctor_finding import Finding
from stillroom.tools.doctor_local import check_folder, leaving_no_folder
from stillroom.tools.doctor_storage import Trial
from stillroom.tools.ending import ends_when_told
from stillroom.tools.render import print_json, print_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """Try a root before a job: what is put there for a trial is removed again. Exit with 1 if
    anything but `ok` is found."""

    root: Positional[str]
    """The cache, or where it shall be: a folder, or an address such as s3://bucket/prefix."""
    size_mb: int = 16
    """Size of the object whose writing and reading is timed, MB; 1 to 1024."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.size_mb <= 1024:
            raise ConfigError("size_mb", "1 to 1024", f"{self.size_mb}", "Change it.")


def run_doctor(job: Doctor) -> int:
    """`stillroom doctor`."""
    with ends_when_told():
        found = examine(job.root, job.size_mb * 1_000_000)
    if job.json:
        print_json(as_json(job.root, found))
    else:
        rows = [(f.level, f.what, f.got, f.do) for f in found]
        print_table(
            ("level", "what", "found", "to do"), rows, text=("level", "what", "found", "to do")
        )
    return 0 if all(finding.level == "ok" for finding in found) else 1


def examine(root: str, size_bytes: int) -> list[Finding]:
    """Try everything.

    Args:
        root: a folder or an address.
        size_bytes: of the large object that is timed.

    Raises:
        ConfigError: no root can have that name.
    """
    storage = Storage(root)
    trial = Trial(storage)
    clean = leaving_no_folder(storage.folder / "probe") if storage.is_local else nullcontext()
    found = check_folder(storage.folder) if storage.is_local else []
    with clean:
        found += trial.run(size_bytes)
    identity, cache = check_identity(storage)
    found.append(identity)
    if cache is not None:
        found.append(check_claims(cache, trial.clock_offset_s))
    return found


def as_json(root: str, found: list[Finding]) -> dict[str, Any]:
    """Plain values; all figures are gathered once more."""
    figures = {name: value for finding in found for name, value in finding.figures.items()}
    return {"root": root, "findings": [asdict(finding) for finding in found], "figures": figures}
