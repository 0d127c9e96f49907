"""Objects below one root, on a local file system or an object store.

The cache needs four things of its storage: read an object or ranges of it, list a prefix, and put
an object that must not exist yet. Nothing is ever overwritten or deleted here. Reads and listings
go through obstore. Local puts are ours, because obstore does not fsync: temporary file, fsync,
link, fsync of the folder and of every folder made.
"""

import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.store import LocalStore, ObjectStore

from stillroom.cache.errors import ConfigError, ForkedError, MissingError, StorageError, first_line

SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    path: str
    size_bytes: int


class Storage:
    """A root and the objects below it.

    Args:
        root: a folder, or an address such as `s3://bucket/prefix`.
        options: passed to obstore for an address (credentials, endpoint, retries).
    """

    def __init__(self, root: str | os.PathLike[str], **options: Any) -> None:
        """Bind to the root; nothing is read or made."""
        self.root = os.fspath(root).removeprefix("file://")
        self.is_local = "://" not in self.root
        self._pid = os.getpid()
        self._options = options
        self._store: ObjectStore | None = None
        self._folder = local_path(self.root).absolute()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"storage {self.root!r}",
                "the process that opened it",
                "a forked child",
                "Start worker processes with the 'spawn' method.",
            )

    def _open(self) -> ObjectStore:
        self._check_process()
        if self._store is None:
            if self.is_local:
                self._store = LocalStore(str(self._folder))
            else:
                self._store = obstore.store.from_url(self.root, **self._options)
        return self._store

    @property
    def folder(self) -> Path:
        """The root's folder; only where `is_local`."""
        return self._folder

    def describe(self, path: str) -> str:
        """Full name of an object, for messages."""
        return str(self._folder / path) if self.is_local else f"{self.root}/{path}"

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        return self.size(path) is not None

    def size(self, path: str) -> int | None:
        """Size of an object in bytes, or None if it is not there."""
        if self.is_local and not self._local(path).is_file():
            return None
        try:
            return int(obstore.head(self._open(), self._checked(path))["size"])
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError as error:
            raise self._unreadable(path, error) from error

    def get(self, path: str) -> bytes:
        """Read a whole object.

        Raises:
            MissingError: it is not there.
            StorageError: it cannot be read.
        """
        self._require(path)
        try:
            return bytes(obstore.get(self._open(), self._checked(path)).bytes())
        except FileNotFoundError as error:
            raise self._missing(path) from error
        except obstore.exceptions.BaseError as error:
            raise self._unreadable(path, error) from error

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Read byte ranges of an object; neighbouring ranges share a request.

        Returns:
            One bytes object a range; shorter than asked where the object ends early (callers check
            hashes).
        """
        if not starts:
            return []
        size = self.size(path)
        if size is None:
            raise self._missing(path)
        ranges = list(zip(starts, lengths, strict=True))
        if any(start + length > size for start, length in ranges):
            whole = self.get(path)  # obstore panics at ranges beyond the end
            return [whole[start : start + length] for start, length in ranges]
        try:
            found = obstore.get_ranges(
                self._open(), self._checked(path), starts=starts, lengths=lengths
            )
            return [bytes(part) for part in found]
        except FileNotFoundError as error:
            raise self._missing(path) from error
        except obstore.exceptions.BaseError as error:
            raise self._unreadable(path, error) from error

    def list(self, prefix: str) -> list[Entry]:
        """All objects below a prefix (a folder), sorted by path; none if it does not exist."""
        if self.is_local and not self._local(prefix).is_dir():
            return []
        entries = []
        try:
            for page in obstore.list(self._open(), prefix=self._checked(prefix)):
                entries += [Entry(item["path"], item["size"]) for item in page]
        except obstore.exceptions.BaseError as error:
            raise self._unreadable(prefix, error) from error
        return sorted((e for e in entries if SAFE_PATH.fullmatch(e.path)), key=lambda e: e.path)

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; durable when this returns True.

        Returns:
            False if an object of that name exists. After a lost reply that object may be this very
            write: whoever
            needs to know reads it back (see `commits`).

        Raises:
            StorageError: it could not be written.
        """
        if self.is_local:
            self._check_process()
            return self._put_local(self._local(path), data)
        try:
            obstore.put(self._open(), self._checked(path), data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return False
        except obstore.exceptions.BaseError as error:
            raise self._unwritable(path, error) from error
        return True

    def probe(self) -> None:
        """Check that put-if-absent works here: the second put of a key must be refused and change
        nothing.

        Raises:
            StorageError: it does not, or the root cannot be written.
        """
        key = f"probe/{uuid.uuid4().hex}"
        first, second = self.put_new(key, b"first"), self.put_new(key, b"second")
        kept = self.get(key)
        if not first or second or kept != b"first":
            raise StorageError(
                self.describe(key),
                "a second put of the same key to be refused",
                f"first put {first}, second put {second}, content {kept!r}",
                "This storage ignores conditional puts: use another one.",
            )

    def check_conditional_puts(self) -> None:
        """Probe before writing where another host may have changed what the storage does."""
        if not self.is_local:
            self.probe()

    def _put_local(self, target: Path, data: bytes) -> bool:
        try:
            self._make_folder(target.parent)
            temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
            finally:
                temporary.unlink(missing_ok=True)
            _fsync_folder(target.parent)
        except OSError as error:
            raise self._unwritable(str(target.relative_to(self._folder)), error) from error
        return True

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _fsync_folder(new.parent)

    def _checked(self, path: str) -> str:
        if not SAFE_PATH.fullmatch(path):
            raise StorageError(
                self.root, "a plain relative path", repr(path), "Report this: paths are made by us."
            )
        return path

    def _local(self, path: str) -> Path:
        target = self._folder / self._checked(path)
        real = Path(os.path.realpath(self._folder)) / path
        if Path(os.path.realpath(target)) != real:
            raise StorageError(
                str(target),
                "no symbolic link below the root",
                "one",
                "Replace the link by what it points to.",
            )
        return target

    def _require(self, path: str) -> None:
        if self.is_local and not self._local(path).is_file():
            raise self._missing(path)

    def _missing(self, path: str) -> MissingError:
        return MissingError(
            self.describe(path), "an object", "nothing", "Check the root, or restore the object."
        )

    def _unreadable(self, path: str, error: Exception) -> StorageError:
        return StorageError(
            self.describe(path), "to read it", first_line(error), "Check access and try again."
        )

    def _unwritable(self, path: str, error: Exception) -> StorageError:
        return StorageError(
            self.describe(path),
            "to write a new object (with a hard link, on a local file system)",
            first_line(error),
            "Check that the root can be written; give buckets as s3:// or gs://, not mounted.",
        )


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(os.fspath(path), "a path", str(error), "Write the path out.") from error


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
