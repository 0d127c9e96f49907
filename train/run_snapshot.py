"""What a run replays: one snapshot, pinned from its first step until the run is through.

A pin is named after the run and after the run's output folder, so that runs of one name over one
cache, in folders or on machines of their own, do not let go of one another's snapshots.
"""

import re
import uuid
from pathlib import Path

from stillroom.cache.errors import CorruptError
from stillroom.cache.pins import pin, renew_pin, unpin
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay.state import snapshots_in
from stillroom.train.checkpoint import checkpoints_of, newest_checkpoint, read_progress
from stillroom.train.durable import write_file

OWNER_FILE = "pin-owner"
"""In an output folder: the random id that its runs' pins are named with. A resumed run finds it,
wherever the folder is mounted."""
OWNER = re.compile(r"[0-9a-f]{16}")


def snapshot_for(cache: Cache, output: Path, run: str) -> Snapshot:
    """What a run replays: the snapshot of its newest checkpoint, or all that is scored now.

    It is pinned before it is opened, so that `gc` keeps its bytes from then on; the pin is renewed
    while the run trains.

    Raises:
        MissingError: a part of the checkpoint's snapshot is gone.
        CorruptError: the output's files are damaged.
    """
    folder = newest_checkpoint(checkpoints_of(output, run))
    if folder is None:
        snapshot_id = cache.snapshot().id
    else:
        (snapshot_id,) = snapshots_in(read_progress(folder).stream)
    pin(cache.storage, pin_name(output, run), [snapshot_id])
    return cache.open_snapshot(snapshot_id)


def keep_snapshot(storage: Storage, output: Path, run: str, *snapshot_ids: str) -> None:
    """Renew a run's pin while it trains on these snapshots."""
    renew_pin(storage, pin_name(output, run), snapshot_ids)


def release_snapshot(storage: Storage, output: Path, run: str) -> None:
    """Let go of what a run replayed, once it is through."""
    unpin(storage, pin_name(output, run))


def pin_name(output: Path, run: str) -> str:
    """Name of the pin of a run with this output folder; the folder's id is drawn at the first call.

    Raises:
        CorruptError: the file of the id holds none.
    """
    path = output / OWNER_FILE
    if not path.is_file():
        write_file(path, uuid.uuid4().hex[:16].encode())
    owner = path.read_bytes().decode(errors="replace")
    if not OWNER.fullmatch(owner):
        do = "Delete the file; what the run pinned before stays pinned for a week."
        raise CorruptError(str(path), "16 hexadecimal digits", repr(owner[:40]), do)
    return f"{run}-{owner}"
