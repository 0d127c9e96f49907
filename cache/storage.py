"""Objects below one root, on a local file system or an object store.

Committed things are put if absent and never overwritten. `put` and `delete` are for what is
advisory (claims, pins) and for the collector. Reads verify nothing: hashes are checked by those
who know them.
"""

import builtins
import os
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stillroom.cache.errors import (
    ConfigError,
    ForkedError,
    MissingError,
    StillroomError,
    StorageError,
)
from stillroom.cache.local_objects import TEMPORARY, LocalObjects
from stillroom.cache.remote_objects import RemoteObjects
from stillroom.cache.storage_entry import SAFE_PATH, Entry
from stillroom.cache.storage_errors import reading, writing

__all__ = ["Entry", "Storage", "local_path"]


class Storage:
    """A root and the objects below it.

    Args:
        root: a folder, or an address such as `s3://bucket/prefix`, whose credentials, region and
            endpoint come from the environment (see `remote_objects`).
        options: passed to obstore for an address (credentials, endpoint, retries).

    Raises:
        ConfigError: the address holds a password or another secret, or there is no such user.
    """

    def __init__(self, root: str | os.PathLike[str], **options: Any) -> None:
        """Bind to the root; nothing is read or made."""
        self.root = os.fspath(root).removeprefix("file://")
        self.is_local = "://" not in self.root
        self._pid = os.getpid()
        self._folder = local_path(self.root).absolute()
        self._backend: LocalObjects | RemoteObjects
        if self.is_local:
            self._backend = LocalObjects(self._folder)
        else:
            self._backend = RemoteObjects(self.root, options)

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
        found = self.entry(path)
        return None if found is None else found.size_bytes

    def entry(self, path: str) -> Entry | None:
        """Size and time of an object, or None if it is not there."""
        with self._reading(path):
            return self._objects(path).entry(path)

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """Read a whole object.

        Args:
            path: of the object.
            max_bytes: the most that an object of this kind can have; a larger one is not read.

        Raises:
            MissingError: it is not there.
            CorruptError: it is larger.
            StorageError: it cannot be read.
        """
        with self._reading(path):
            return self._objects(path).get(path, max_bytes)

    def get_many(
        self, paths: Sequence[str], max_bytes: int | None = None
    ) -> list[bytes | StillroomError]:
        """Read many small objects, several at a time on an object store.

        Args:
            paths: of the objects.
            max_bytes: as in `get`, of each.

        Returns:
            For each path its bytes, or the error that `get` would raise.
        """
        self._check_process()

        def read(path: str) -> bytes | StillroomError:
            try:
                return self.get(path, max_bytes)
            except StillroomError as error:
                return error

        if isinstance(self._backend, LocalObjects):
            return [read(path) for path in paths]
        return list(self._backend.each(read, paths))

    def get_ranges(
        self,
        path: str,
        starts: Sequence[int],
        lengths: Sequence[int],
        size: int | None = None,
    ) -> list[bytes]:
        """Read byte ranges of an object; on an object store, neighbouring ranges share a request.

        Args:
            path: of the object.
            starts: first byte of each range.
            lengths: bytes of each range.
            size: what the whole object must measure in bytes, if that is known; it costs no
                request to check.

        Returns:
            One bytes object a range; shorter than asked where the object ends early (callers check
            hashes).

        Raises:
            MissingError: it is not there.
            CorruptError: it has another size.
            StorageError: it cannot be read.
        """
        if not starts:
            return []
        with self._reading(path):
            return self._objects(path).get_ranges(path, starts, lengths, size)

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; durable when this returns True.

        Returns:
            False if an object of that name exists. After a lost reply that object may be this very
            write: whoever needs to know reads it back (see `commits`).

        Raises:
            StorageError: it could not be written.
        """
        with self._writing(path):
            return self._objects(path).put_new(path, data)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, over another of its name if there is one; durable when this returns.

        Only for advisory objects (claims, pins), on whose content nothing else depends.

        Raises:
            StorageError: it could not be written.
        """
        with self._writing(path):
            self._objects(path).put(path, data)

    def make_durable(self, path: str) -> None:
        """Make an object durable that a failed put left; on an object store it is.

        Raises:
            StorageError: it cannot be made durable.
        """
        self._checked(path)
        self._check_process()
        if isinstance(self._backend, LocalObjects):
            with self._writing(path):
                self._backend.make_durable(path)

    def delete(self, path: str) -> None:
        """Remove an object; none of that name is no error. Local folders that become empty go
        too, except those right below the root.

        Raises:
            StorageError: it could not be removed.
        """
        with self._writing(path):
            self._objects(path).delete(path)

    def delete_temporary(self, path: str) -> None:
        """Remove a temporary file that `temporaries` listed; none is no error.

        Raises:
            StorageError: it could not be removed, or is no temporary file.
        """
        folder, _, name = path.rpartition("/")
        if not TEMPORARY.fullmatch(name):
            raise StorageError(self.describe(path), "a temporary file", "another", "Report this.")
        if folder:
            self._checked(folder)
        self._check_process()
        if isinstance(self._backend, LocalObjects):
            with self._writing(path):
                self._backend.delete(path)

    def now(self) -> float:
        """Seconds since the epoch by the store's own clock, the one of `Entry.modified`. Locally
        this writes and removes a temporary file; on an object store it leaves a small object below
        `probe/`, which `gc` collects.

        Raises:
            StorageError: the root cannot be written.
        """
        self._check_process()
        with self._writing("probe"):
            return self._backend.now()

    def probe(self, key: str | None = None) -> None:
        """Check that put-if-absent works here: the second put of a key must be refused and change
        nothing.

        Args:
            key: the object to try, which stays; by default a new one below `probe/`, for `gc`.

        Raises:
            StorageError: it does not, or the root cannot be written.
        """
        key = key or f"probe/{uuid.uuid4().hex}"
        first, second = self.put_new(key, b"first"), self.put_new(key, b"second")
        try:
            kept = self.get(key)
        except MissingError:
            kept = None
        if second or kept != b"first":  # the reply to the first put may have been lost
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

    def list(self, prefix: str) -> builtins.list[Entry]:
        """All objects below a prefix (a folder), sorted by path; none if it does not exist. What
        has a name that we do not give is left out."""
        with self._reading(prefix):
            return sorted(self._objects(prefix).list(prefix), key=lambda entry: entry.path)

    def list_all(self) -> builtins.list[Entry]:
        """Everything below the root, sorted by path; also objects that no `list` shows because
        their names cannot be ours, but for local names with a dot in front: those are the file
        system's."""
        self._check_process()
        with self._reading(""):
            return sorted(self._backend.list_all(), key=lambda entry: entry.path)

    def temporaries(self) -> builtins.list[Entry]:
        """Temporary files of local puts, sorted by path. A dead writer leaves one; those of live
        writers are listed too and tell themselves apart by their age. Object stores have none."""
        self._check_process()
        if not isinstance(self._backend, LocalObjects):
            return []
        with self._reading(""):
            return sorted(self._backend.temporaries(), key=lambda entry: entry.path)

    def _objects(self, path: str) -> LocalObjects | RemoteObjects:
        self._check_process()
        self._checked(path)
        return self._backend

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"storage {self.root!r}",
                "the process that opened it",
                "a forked child",
                "Start worker processes with the 'spawn' method.",
            )

    def _checked(self, path: str) -> None:
        if not SAFE_PATH.fullmatch(path):
            raise StorageError(
                self.root, "a plain relative path", repr(path), "Report this: paths are made by us."
            )

    def _reading(self, path: str) -> AbstractContextManager[None]:
        return reading(self.describe(path), self.is_local)

    def _writing(self, path: str) -> AbstractContextManager[None]:
        return writing(self.describe(path), self.is_local)


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        ConfigError: there is no such user, or no path can be so.
    """
    if "\0" in os.fspath(path):
        got = "one with a zero byte"
        raise ConfigError(repr(os.fspath(path)), "a path", got, "Write the path out.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(os.fspath(path), "a path", str(error), "Write the path out.") from error
