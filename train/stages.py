"""What each finished stage of a run did, in small files, so that a rerun goes on where the run
stopped.

Every stage is safe to run again by itself; the records only save the time of finding that out. A
record counts only while the objects that it names are there; rollouts may be gone where their part
is retired, as `gc` removes those.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage
from stillroom.cache.store import part_path, retired_path
from stillroom.train.durable import write_file


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One finished stage."""

    seconds: float
    """Wall time of the stage in the process that finished it."""
    objects: tuple[tuple[str, str], ...]
    """(root, path) of what it left in caches."""
    values: dict[str, Any] = field(default_factory=dict)
    """What it measured."""


Work = Callable[[], tuple[list[tuple[str, str]], dict[str, Any]]]


class StageLog:
    """The records of one run.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        """Bind to the folder."""
        self._folder = folder

    def finished(self, name: str) -> StageRecord | None:
        """The record of a stage whose objects are all there, or None.

        Raises:
            CorruptError: there is a record, but it is damaged.
        """
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return None
        value = jsonfile.load(path.read_bytes(), str(path))
        try:
            value["objects"] = tuple((root, at) for root, at in value["objects"])
        except (KeyError, TypeError, ValueError) as error:
            do = "Delete it: the stage is done again."
            raise CorruptError(str(path), "the record of a stage", repr(error), do) from error
        record: StageRecord = jsonfile.build(StageRecord, value, str(path))
        return record if all(_is_kept(Storage(root), at) for root, at in record.objects) else None

    def run(self, name: str, work: Work) -> StageRecord:
        """Do a stage's work, unless it is finished."""
        record = self.finished(name)
        if record is None:
            start = time.perf_counter()
            objects, values = work()
            record = StageRecord(time.perf_counter() - start, tuple(objects), values)
            write_file(self._folder / f"{name}.json", jsonfile.dump(asdict(record)))
        return record


def _is_kept(storage: Storage, path: str) -> bool:
    part = PurePosixPath(path).stem
    gone = path == part_path(part) and storage.exists(retired_path(part))
    return gone or storage.exists(path)
