"""Folders that are there whole or not at all, and small files replaced in one step. Local file
systems only."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stillroom.cache.errors import StillroomError, StorageError

DO = "Make room on the disk, or check that the folder can be written."
DO_REFUSED = "Mend what it names; nothing is wrong with the disk."


def write_folder(parent: Path, fill: Callable[[Path], str]) -> Path:
    """Make a folder by filling a temporary one beside it and renaming that.

    Args:
        parent: where the folder goes.
        fill: writes the files into the folder that it is given, and returns the final name. A
            folder of that name that is there already stays, so the name must say what is in it.

    Returns:
        The folder.

    Raises:
        StorageError: the files cannot be written, or a library refuses to write them.
    """
    temporary = parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with _told(parent, "to write a folder"):
            temporary.mkdir(parents=True)
            target = parent / fill(temporary)
            for path in sorted(temporary.rglob("*")):
                fsync(path)
            fsync(temporary)
            if not target.exists():
                temporary.rename(target)
            fsync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_file(target: Path, data: bytes) -> None:
    """Replace a file's content in one step.

    Raises:
        StorageError: it cannot be written; the old content is as it was.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with _told(target, "to write a file"):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            fsync(temporary)
            temporary.replace(target)
            fsync(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it.

    Raises:
        StorageError: it cannot be removed.
    """
    with _told(path, "to remove it"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _told(where: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, StillroomError):
            raise
        do = DO_REFUSED if isinstance(error, ValueError) else DO
        raise StorageError(str(where), expected, str(error), do) from error


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
