"""Folders that are there whole or not at all, and small files replaced in one step. Local file
systems only."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from stillroom.cache.errors import StillroomError, StorageError


def write_folder(parent: Path, fill: Callable[[Path], str]) -> Path:
    """Make a folder by filling a temporary one beside it and renaming that.

    Args:
        parent: where the folder goes.
        fill: writes the files into the folder that it is given, and returns the final name. A
            folder of that name that is there already stays, so the name must say what is in it.

    Returns:
        The folder.

    Raises:
        StorageError: the files cannot be written.
    """
    temporary = parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        target = parent / fill(temporary)
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync(temporary)
        if not target.exists():
            temporary.rename(target)
        fsync(parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, StillroomError):
            raise
        do = "Make room on the disk, or check that the folder can be written."
        raise StorageError(str(parent), "to write a folder", str(error), do) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_file(target: Path, data: bytes) -> None:
    """Replace a file's content in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.write_bytes(data)
    fsync(temporary)
    temporary.replace(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
