"""Caches in memory, any object of which can be replaced by other bytes."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from stillroom.cache.errors import MissingError, StillroomError
from stillroom.cache.ranges import too_large, wrong_size
from stillroom.cache.storage import Storage
from stillroom.cache.storage_entry import Entry
from stillroom.cache.store import Cache
from tests.tools.small_cache import fill, make_cache


class MemoryStorage(Storage):
    """Objects in a dict.

    Args:
        objects: bytes by path.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        """Hold them."""
        super().__init__("memory://fuzz")
        self.objects = objects

    def entry(self, path: str) -> Entry | None:
        """Size of an object, written at the start of time."""
        data = self.objects.get(path)
        return None if data is None else Entry(path, len(data), 0.0)

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """A whole object."""
        if path not in self.objects:
            raise MissingError(self.describe(path), "an object", "nothing", "Restore it.")
        data = self.objects[path]
        if max_bytes is not None and len(data) > max_bytes:
            raise too_large(self.describe(path), max_bytes, len(data))
        return data

    def get_many(
        self, paths: Sequence[str], max_bytes: int | None = None
    ) -> list[bytes | StillroomError]:
        """Several objects."""
        return [self.get(path, max_bytes) for path in paths]

    def get_ranges(
        self, path: str, starts: Sequence[int], lengths: Sequence[int], size: int | None = None
    ) -> list[bytes]:
        """Ranges of an object, cut off at its end."""
        data = self.get(path)
        if size is not None and size != len(data):
            raise wrong_size(self.describe(path), size, len(data))
        pairs = zip(starts, lengths, strict=True)
        return [data[start : start + length] for start, length in pairs]

    def put_new(self, path: str, data: bytes) -> bool:
        """Add an object, unless it is there."""
        return self.objects.setdefault(path, data) is data

    def put(self, path: str, data: bytes) -> None:
        """Set an object."""
        self.objects[path] = data

    def list(self, prefix: str) -> list[Entry]:
        """Objects below a folder."""
        found = [Entry(path, len(data), 0.0) for path, data in self.objects.items()]
        return sorted(
            (e for e in found if e.path.startswith(f"{prefix}/")), key=lambda entry: entry.path
        )

    def now(self) -> float:
        """The start of time."""
        return 0.0


@cache
def small_cache(shard_format: str) -> Cache:
    """A cache with an object of every kind; not to be changed."""
    with TemporaryDirectory() as folder:
        root = Path(folder) / "cache"
        made = make_cache(root, shard_format)
        fill(made)
        paths = [entry.path for entry in made.storage.list_all()]
        objects = {path: made.storage.get(path) for path in paths}
        return Cache(MemoryStorage(objects), made.identity)


def objects_of(cache: Cache) -> dict[str, bytes]:
    """Bytes by path."""
    assert isinstance(cache.storage, MemoryStorage)
    return cache.storage.objects


def with_objects(cache: Cache, changed: dict[str, bytes]) -> Cache:
    """A copy with other bytes in some places."""
    return Cache(MemoryStorage(objects_of(cache) | changed), cache.identity)
