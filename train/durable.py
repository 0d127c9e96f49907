"""Folders that are there whole or not at all, and small files replaced in one step. Local file
systems only."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder by filling a temporary one beside it and renaming that.

    Args:
        target: must not exist, or is replaced by nothing: an existing folder stays.
        fill: writes the files into the folder that it is given.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        fill(temporary)
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync(temporary)
        if not target.exists():
            temporary.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
