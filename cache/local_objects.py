"""Objects as files below a folder: durable puts, reads of exact ranges, listings with sizes and
times, and no symbolic link anywhere.

A put is a temporary file, fsync, link (or rename, where it may overwrite), fsync of the folder.
Folders are made from the top down, each made durable before anything is made in it. So of the
folders that a put finds, only the deepest may be another writer's that is not durable yet, and
that one is fsynced as well. Methods raise what the system raises; `Storage` says which object.
"""

import errno
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stillroom.cache.errors import StorageError
from stillroom.cache.ranges import too_large, wrong_size
from stillroom.cache.storage_entry import Entry, is_ours

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
JOINED_BYTES = 1 << 16
"""Ranges that touch are read together as far as they have no more bytes than this: a call takes as
long as copying them, and other threads take the interpreter meanwhile."""
ATTEMPTS = 100
"""How often a put makes its folder, which `delete` may remove while it is empty."""


class LocalObjects:
    """Files below a folder.

    Args:
        folder: absolute; it need not exist. It may itself be a symbolic link.
    """

    def __init__(self, folder: Path) -> None:
        """Bind to the folder; nothing is read or made."""
        self.folder = folder
        self._checked: set[str] = set()

    def entry(self, path: str) -> Entry | None:
        """Size and time of a file, or None if it is not there."""
        try:
            status = os.lstat(self._target(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(status.st_mode):
            raise _linked(self._target(path))
        is_file = stat.S_ISREG(status.st_mode)
        return Entry(path, status.st_size, status.st_mtime) if is_file else None

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """Read a whole file, unless it is larger than that."""
        with os.fdopen(self._open(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise too_large(str(self.folder / path), max_bytes, size)
            return file.readall()

    def get_ranges(
        self, path: str, starts: Sequence[int], lengths: Sequence[int], size: int | None
    ) -> list[bytes]:
        """Read ranges of a file."""
        handle = self._open(path)
        try:
            found = os.fstat(handle).st_size
            if size is not None and found != size:
                raise wrong_size(str(self.folder / path), size, found)
            return [
                part
                for first, stop in _together(starts, lengths)
                for part in _parts(handle, starts[first:stop], lengths[first:stop], found)
            ]
        finally:
            os.close(handle)

    def list(self, prefix: str) -> Iterator[Entry]:
        """All files below a folder, in any order."""
        self._target(f"{prefix}/any")
        return _walk(self.folder / prefix, f"{prefix}/", is_ours)

    def list_all(self) -> Iterator[Entry]:
        """All files but hidden ones, whatever their names."""
        return _walk(self.folder, "", lambda name: not name.startswith("."))

    def temporaries(self) -> Iterator[Entry]:
        """Temporary files of puts, whether their writers live or not."""
        return _walk(self.folder, "", lambda name: TEMPORARY.fullmatch(name) is not None)

    def put_new(self, path: str, data: bytes) -> bool:
        """Write a file that must not exist; durable when this returns True."""
        try:
            self._put(path, data, _link)
        except FileExistsError:
            return False
        return True

    def put(self, path: str, data: bytes) -> None:
        """Write or overwrite a file; durable when this returns."""
        self._put(path, data, os.replace)

    def make_durable(self, path: str) -> None:
        """Make a file durable that a failed put left."""
        handle = self._open(path)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        _fsync_folder(self._target(path).parent)

    def delete(self, path: str) -> None:
        """Remove a file if it is there, and the folders that this leaves empty; the folders right
        below the root stay."""
        target = self._unlinked(path)
        folder = target.parent
        try:
            os.unlink(target)
            _fsync_folder(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        while folder != self.folder and folder.parent != self.folder:
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return
            folder = folder.parent

    def now(self) -> float:
        """The file system's clock: the time of a new temporary file, which is removed again."""
        _make_folder(self.folder)
        temporary = self.folder / _temporary_name()
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            return os.fstat(handle).st_mtime
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)

    def _put(self, path: str, data: bytes, publish: Callable[[Path, Path], None]) -> None:
        target = self._unlinked(path)
        for attempt in range(ATTEMPTS):
            try:
                _make_folder(target.parent)
                _put_once(target, data, publish)
                return
            except FileNotFoundError:
                if attempt + 1 == ATTEMPTS:
                    raise

    def _open(self, path: str) -> int:
        target = self._target(path)
        try:
            handle = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except NotADirectoryError as error:
            raise FileNotFoundError(str(error)) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _linked(target) from error
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileNotFoundError(f"{target} is no file")
        return handle

    def _unlinked(self, path: str) -> Path:
        target = self._target(path)
        if target.is_symlink():
            raise _linked(target)
        return target

    def _target(self, path: str) -> Path:
        """The file of a path, none of whose folders is a symbolic link. A folder that was seen is
        not looked at again: this is for roots that came with links, not for races."""
        parent = path.rpartition("/")[0]
        if parent and parent not in self._checked:
            folder = self.folder
            for name in parent.split("/"):
                folder = folder / name
                try:
                    mode = os.lstat(folder).st_mode
                except (FileNotFoundError, NotADirectoryError):
                    break
                if stat.S_ISLNK(mode):
                    raise _linked(folder)
            else:
                self._checked.add(parent)
        return self.folder / path


def _linked(target: Path) -> StorageError:
    do = "Replace the link by what it points to."
    return StorageError(str(target), "no symbolic link below the root", "one", do)


def _together(starts: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of ranges that are read at once."""
    first = 0
    for i in range(1, len(starts) + 1):
        touches = i < len(starts) and starts[i] == starts[i - 1] + lengths[i - 1]
        if not touches or starts[i] + lengths[i] - starts[first] > JOINED_BYTES:
            yield first, i
            first = i


def _parts(
    handle: int, starts: Sequence[int], lengths: Sequence[int], size: int
) -> Iterator[bytes]:
    """Ranges that follow one another, of a file of so many bytes."""
    begin, stop = starts[0], starts[-1] + lengths[-1]
    data = _read(handle, begin, max(0, min(stop, size) - begin))
    return (data[s - begin : s - begin + n] for s, n in zip(starts, lengths, strict=True))


def _read(handle: int, start: int, length: int) -> bytes:
    data = os.pread(handle, length, start)
    while len(data) < length:
        more = os.pread(handle, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _walk(folder: Path, prefix: str, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """Files below a folder whose own names are wanted; what vanishes meanwhile is left out."""
    try:
        found = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in found:
        ours = is_ours(item.name)
        if ours and item.is_symlink():
            raise _linked(Path(item.path))
        if item.is_dir(follow_symlinks=False):
            if ours:
                yield from _walk(Path(item.path), f"{prefix}{item.name}/", wanted)
        elif wanted(item.name) and item.is_file(follow_symlinks=False):
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Entry(prefix + item.name, status.st_size, status.st_mtime)


def _temporary_name() -> str:
    return f".{uuid.uuid4().hex}.tmp"


def _put_once(target: Path, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    temporary = target.parent / _temporary_name()
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(target.parent)


def _link(temporary: Path, target: Path) -> None:
    os.link(temporary, target)


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    _fsync_parent(folder)
    for new in reversed(missing):
        try:
            os.mkdir(new)
        except FileExistsError as error:
            if not stat.S_ISDIR(os.stat(new).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(new)) from error
        _fsync_folder(new.parent)


def _fsync_parent(folder: Path) -> None:
    """Make a folder that was found durable. Where the parent cannot be opened it was not made by
    a writer, who would have failed."""
    try:
        _fsync_folder(folder.parent)
    except PermissionError:
        return


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
