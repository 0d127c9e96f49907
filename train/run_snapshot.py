"""What a run replays: snapshots, pinned from its first step until the run is through. For
`stillroom train`, and for training loops of your own.

A pin is named after the run and after the run's output folder, so that runs of one name over one
cache, in folders or on machines of their own, do not let go of one another's snapshots. It lasts
for a week from when it was put or renewed.
"""

import os
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path

from stillroom.cache.errors import CorruptError, StorageError
from stillroom.cache.pins import pin, renew_pin, unpin
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay.state import snapshots_in
from stillroom.train.checkpoint import (
    checkpoints_of,
    kept_checkpoints,
    newest_checkpoint,
    read_progress,
)
from stillroom.train.durable import write_file

OWNER_FILE = "pin-owner"
"""In an output folder: the random id that its runs' pins are named with, and on the next line the
folder that it was drawn for. A resumed run finds it; a copy or a moved folder draws another."""
OWNER = re.compile(rb"([0-9a-f]{16})\n(.+)", re.DOTALL)
DO = "Remove it; what the run pinned before stays pinned for a week."


def snapshot_for(cache: Cache, output: Path, run: str, resumed: str | None = None) -> Snapshot:
    """What a run replays: the snapshot of its newest checkpoint, or all that is scored now.

    It is pinned before it is opened, and with it those of all checkpoints that are kept, so that
    `gc` keeps their bytes from then on. Of several ranks, one calls it.

    Args:
        cache: the cache.
        output: the run's folder.
        run: its name; runs with one output have names of their own.
        resumed: id of the snapshot to go on with, for a loop whose checkpoints are its own.

    Raises:
        MissingError: a part of the snapshot is gone.
        CorruptError: the output's files are damaged.
    """
    snapshot_id = resumed or _resumed(output, run) or cache.snapshot().id
    pin(cache.storage, pin_name(output, run), {snapshot_id, *_of_checkpoints(output, run)})
    return cache.open_snapshot(snapshot_id)


def keep_snapshot(storage: Storage, output: Path, run: str, *snapshot_ids: str) -> None:
    """Renew a run's pin while it trains on these snapshots; those of its checkpoints stay pinned.

    Call it every now and then, with every checkpoint for one: the pin is put again once half of its
    week is over. A snapshot that is taken up later is pinned by this before it is opened.
    """
    wanted = {*snapshot_ids, *_of_checkpoints(output, run)}
    renew_pin(storage, pin_name(output, run), wanted)


def release_snapshot(storage: Storage, output: Path, run: str) -> None:
    """Let go of what a run replayed, once it is through."""
    unpin(storage, pin_name(output, run))


def pin_name(output: Path, run: str) -> str:
    """Name of the pin of a run with this output folder; the folder's id is drawn at the first call,
    and again where the folder is a copy of another or was moved, which is printed.

    Raises:
        CorruptError: the file of the id holds none.
        StorageError: it cannot be read or written.
    """
    path, here = output / OWNER_FILE, os.fsencode(output.resolve())
    try:
        found = path.read_bytes() if path.exists() else None
        if found is None:
            found = _draw(path, here)
        match = OWNER.fullmatch(found)
        if match is not None and match[2] != here:
            there = os.fsdecode(match[2])
            what = f"{output} is a copy of {there}, or was moved: its runs get pins of their own"
            print(f"  pins: {what}", file=sys.stderr, flush=True)
            match = OWNER.fullmatch(_draw(path, here))
    except OSError as error:
        raise StorageError(str(path), "a file that can be used", str(error), DO) from error
    if match is None:
        expected = "16 hexadecimal digits and a folder"
        raise CorruptError(str(path), expected, repr(found[:40]), DO)
    return f"{run}-{match[1].decode()}"


def _draw(path: Path, folder: bytes) -> bytes:
    drawn = uuid.uuid4().hex[:16].encode() + b"\n" + folder
    write_file(path, drawn)
    return drawn


def _resumed(output: Path, run: str) -> str | None:
    folder = newest_checkpoint(checkpoints_of(output, run))
    return None if folder is None else snapshots_in(read_progress(folder).stream)[0]


def _of_checkpoints(output: Path, run: str) -> set[str]:
    """Snapshots of a run's checkpoints, but for damaged ones: no run can resume from those."""
    found: set[str] = set()
    for folder in kept_checkpoints(checkpoints_of(output, run)):
        with suppress(CorruptError):
            found.update(snapshots_in(read_progress(folder).stream))
    return found
