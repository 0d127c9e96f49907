"""What `doctor` looks at where the root is a folder: its file system, free space, and symbolic
links below it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.cache.storage_entry import is_ours
from stillroom.tools.doctor_finding import Finding, Level

MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = ("tmpfs", "ramfs")
SCARCE_BYTES, NO_BYTES = 2 << 30, 64 << 20
SCARCE_FILES = 10_000
MOST_ENTRIES = 200_000
"""Files and folders that are looked at for links."""


def check_folder(folder: Path) -> list[Finding]:
    """Look at a root's folder, or at the one that it will be made in; nothing is written."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return [_file_system(there), _free_space(there), _links(folder)]


@contextmanager
def leaving_no_folder(folder: Path) -> Iterator[None]:
    """Takes away again the folders that the block makes on the way to this one, if they are
    empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError:
                break


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder lies on, such as ext4; empty where that is not told."""
    if not MOUNTS.is_file():
        return ""
    found, kind, path = -1, "", folder.resolve()
    for line in MOUNTS.read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= found:
            found, kind = len(mount), right.split()[0]
    return kind


def _file_system(folder: Path) -> Finding:
    what, kind = "file system", file_system(folder)
    if kind in IN_MEMORY:
        got = f"{kind}: it is in memory, and gone when the machine is"
        return Finding(level="warning", what=what, got=got, do="Use a folder on a disk.")
    if kind.startswith("fuse"):
        do = "Give a bucket by its own address (s3://, gs://), not mounted."
        got = f"{kind}: many of these keep no promise about links and fsync"
        return Finding(level="warning", what=what, got=got, do=do)
    return Finding(level="ok", what=what, got=kind or "not told by this system")


def _free_space(folder: Path) -> Finding:
    usage, status = shutil.disk_usage(folder), os.statvfs(folder)
    got = f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} GB"
    figures = {"free_bytes": float(usage.free)}
    scarce_files = status.f_files > 0 and status.f_favail < SCARCE_FILES
    if scarce_files:
        got += f", and {status.f_favail:,} more files"
    level: Level = "bad" if usage.free < NO_BYTES else "warning"
    if usage.free >= SCARCE_BYTES and not scarce_files:
        return Finding(level="ok", what="free space", got=got, figures=figures)
    do = "Make room; 'stillroom estimate' says how much a job takes."
    return Finding(level=level, what="free space", got=got, do=do, figures=figures)


def _links(folder: Path) -> Finding:
    what, seen = "symbolic links below the root", 0
    for parent, folders, files in os.walk(folder):
        names = [name for name in (*folders, *files) if is_ours(name)]
        seen += len(names)
        for name in names:
            path = Path(parent, name)
            if path.is_symlink():
                do = "Replace the link by what it points to."
                return Finding(level="bad", what=what, got=f"{path}", do=do)
        if seen > MOST_ENTRIES:
            return Finding(level="ok", what=what, got=f"none among the first {seen:,} entries")
    return Finding(level="ok", what=what, got="none")
