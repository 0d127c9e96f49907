"""Local objects: on disk before they are reported, whatever else makes and removes folders."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.cache.errors import MissingError, StorageError
from stillroom.cache.local_objects import JOINED_BYTES
from stillroom.cache.storage import Storage

Events = list[tuple[str, int]]
FILLER = """
import resource, sys
from stillroom.cache.errors import StorageError
from stillroom.cache.storage import Storage
storage = Storage(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for put in (storage.put_new, storage.put):
    try:
        put("a/large", b"x" * 1001)
    except StorageError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(storage.put_new("a/large", b"y" * 1001))
"""
WRITER = """
import sys
from stillroom.cache.storage import Storage
storage = Storage(sys.argv[1])
print("ready", flush=True)
while True:
    storage.put("claims/a", b"x" * 100_000)
"""
STRANGER = """
import os, sys
from stillroom.cache.errors import StorageError
from stillroom.cache.storage import Storage
storage = Storage(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)  # modes do not bind root
assert storage.get("a/b") == b"committed"
try:
    storage.put_new("a/c", b"x")
except StorageError as error:
    print(error)
"""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A storage whose root does not exist yet."""
    return Storage(tmp_path / "root")


def files(storage: Storage) -> list[str]:
    """Every file below the root, hidden ones too."""
    found = (path for path in storage.folder.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(storage.folder)) for path in found)


def folders(storage: Storage) -> list[str]:
    """Every folder below the root."""
    found = (path for path in storage.folder.rglob("*") if path.is_dir())
    return sorted(str(path.relative_to(storage.folder)) for path in found)


def inode(storage: Storage, path: str) -> int:
    """Number of a file or folder."""
    return (storage.folder / path).stat().st_ino


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What is changed on disk, and with which file or folder."""
    happened: Events = []
    fsync, link, mkdir, replace, unlink = os.fsync, os.link, os.mkdir, os.replace, os.unlink

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        happened.append(("fsync", os.fstat(handle).st_ino))

    def recorded_publish(
        name: str, publish: Callable[[Path, Path], None]
    ) -> Callable[[Path, Path], None]:
        def recorded(source: Path, target: Path) -> None:
            publish(source, target)
            happened.append((name, target.stat().st_ino))

        return recorded

    def recorded_mkdir(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        happened.append(("mkdir", path.stat().st_ino))

    def recorded_unlink(path: Path) -> None:
        number = path.stat().st_ino
        unlink(path)
        if not path.name.endswith(".tmp"):
            happened.append(("unlink", number))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_publish("link", link))
    monkeypatch.setattr(os, "replace", recorded_publish("replace", replace))
    monkeypatch.setattr(os, "mkdir", recorded_mkdir)
    monkeypatch.setattr(os, "unlink", recorded_unlink)
    return happened


def test_a_put_is_on_disk_before_it_is_reported(storage: Storage, events: Events) -> None:
    assert storage.put_new("a/b/c", b"x")
    assert events == [
        ("fsync", inode(storage, "../..")),
        ("mkdir", inode(storage, ".")),
        ("fsync", inode(storage, "..")),
        ("mkdir", inode(storage, "a")),
        ("fsync", inode(storage, ".")),
        ("mkdir", inode(storage, "a/b")),
        ("fsync", inode(storage, "a")),
        ("fsync", inode(storage, "a/b/c")),
        ("link", inode(storage, "a/b/c")),
        ("fsync", inode(storage, "a/b")),
    ]


@pytest.mark.parametrize("publish", ["link", "replace"])
def test_a_folder_that_another_writer_has_just_made_is_made_durable(
    storage: Storage, events: Events, publish: str
) -> None:
    (storage.folder / "a" / "b").mkdir(parents=True)
    events.clear()
    put = storage.put_new if publish == "link" else storage.put
    put("a/b/d", b"y")
    assert events == [
        ("fsync", inode(storage, "a")),
        ("fsync", inode(storage, "a/b/d")),
        (publish, inode(storage, "a/b/d")),
        ("fsync", inode(storage, "a/b")),
    ]


def test_a_delete_is_on_disk_before_it_is_reported(storage: Storage, events: Events) -> None:
    storage.put_new("a/b/c", b"x")
    storage.put_new("a/b/d", b"x")
    number = inode(storage, "a/b/c")
    events.clear()
    storage.delete("a/b/c")
    assert events == [("unlink", number), ("fsync", inode(storage, "a/b"))]


@pytest.mark.parametrize("put", ["put_new", "put"])
@pytest.mark.parametrize("broken", ["fsync", "publish"])
def test_a_put_that_cannot_be_made_durable_fails_and_leaves_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, broken: str, put: str
) -> None:
    storage.put_new("a/b", b"x")
    publish = "link" if put == "put_new" else "replace"

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, publish if broken == "publish" else broken, refuse)
    with pytest.raises(StorageError, match=r"a/c: expected to write.*Operation not supported"):
        getattr(storage, put)("a/c", b"x")
    assert files(storage) == ["a/b"]


def test_a_parent_that_may_not_be_opened_is_left_alone(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.folder.mkdir()
    above, opened = storage.folder.parent, os.open

    def guarded(path: Path, flags: int, *rest: int) -> int:
        if path == above:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", guarded)
    assert storage.put_new("a/b", b"x")


def test_empty_folders_go_but_not_those_right_below_the_root(storage: Storage) -> None:
    for path in ("scores/p/a/one", "scores/p/b/one", "scores/q/c/one", "cache.json"):
        storage.put_new(path, b"x")
    storage.delete("scores/p/a/one")
    assert folders(storage) == ["scores", "scores/p", "scores/p/b", "scores/q", "scores/q/c"]
    for path in ("scores/p/b/one", "scores/q/c/one", "cache.json"):
        storage.delete(path)
    assert folders(storage) == ["scores"]


def test_a_writer_makes_a_folder_again_that_was_removed_meanwhile(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, left = os.mkdir, 3

    def removed_at_once(path: Path, mode: int = 0o777) -> None:
        nonlocal left
        made(path, mode)
        if path.name == "attempt" and left:
            left -= 1
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", removed_at_once)
    assert storage.put_new("scores/part/attempt/object", b"x")
    assert left == 0
    assert files(storage) == ["scores/part/attempt/object"]


def test_a_folder_that_always_vanishes_is_an_error(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = os.mkdir

    def removed_at_once(path: Path, mode: int = 0o777) -> None:
        made(path, mode)
        os.rmdir(path)

    storage.put_new("a", b"x")
    monkeypatch.setattr(os, "mkdir", removed_at_once)
    with pytest.raises(StorageError, match=r"b/c: expected to write it; got .*No such file"):
        storage.put_new("b/c", b"x")


def test_writers_and_a_remover_of_one_folder_lose_nothing(storage: Storage) -> None:
    """Folders come and go under writers, none of which fails or loses an object."""
    failures: list[str] = []

    def write_and_delete(me: int) -> None:
        try:
            for i in range(60):
                path = f"scores/part/attempt/{me}-{i}"
                assert storage.put_new(path, b"x")
                assert storage.get(path) == b"x"
                storage.delete(path)
        except BaseException as error:
            failures.append(repr(error) + str(error))

    threads = [threading.Thread(target=write_and_delete, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files(storage) == []
    assert folders(storage) == ["scores"]


@pytest.mark.dist
def test_a_killed_writer_leaves_a_temporary_file_which_only_that_listing_shows(
    storage: Storage,
) -> None:
    storage.put_new("a/b", b"x")
    before = storage.now()
    while not storage.temporaries():
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, storage.root], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while child.poll() is None and not storage.temporaries():
            time.sleep(0.0005)
        child.kill()
        child.communicate()
    (left,) = storage.temporaries()
    assert left.path.startswith("claims/.")
    assert before <= left.modified <= storage.now()
    assert all(".tmp" not in entry.path for entry in storage.list("claims"))
    assert storage.get_many(["claims/a"])[0] == b"x" * 100_000 or not storage.list("claims")
    storage.delete_temporary(left.path)
    storage.delete_temporary(left.path)
    assert storage.temporaries() == []
    assert storage.get("a/b") == b"x"


@pytest.mark.parametrize("path", ["a/b", ".x.tmp", f"../.{'0' * 32}.tmp", f"a/../.{'0' * 32}.tmp"])
def test_only_a_temporary_file_below_the_root_is_deleted_as_one(
    storage: Storage, path: str
) -> None:
    storage.put_new("a/b", b"x")
    outside = storage.folder.parent / f".{'0' * 32}.tmp"
    outside.write_bytes(b"x")
    with pytest.raises(StorageError):
        storage.delete_temporary(path)
    assert outside.exists()
    assert storage.exists("a/b")


def test_a_listing_goes_through_no_link(storage: Storage, tmp_path: Path) -> None:
    storage.put_new("a/b/c", b"x")
    (tmp_path / "outside").mkdir()
    (storage.folder / "a" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match=r"a/link: expected no symbolic link below the root"):
        storage.list("a")
    assert [entry.path for entry in storage.list("a/b")] == ["a/b/c"]


def test_what_is_no_file_is_missing(storage: Storage) -> None:
    storage.put_new("a/b", b"x")
    os.mkfifo(storage.folder / "a" / "pipe")
    for path in ("a", "a/pipe"):
        with pytest.raises(MissingError):
            storage.get(path)
        assert storage.size(path) is None
    assert [entry.path for entry in storage.list("a")] == ["a/b"]


@pytest.mark.dist
def test_ranges_that_touch_are_read_together(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3 * JOINED_BYTES)
    storage.put_new("a", data)
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def recorded(handle: int, length: int, start: int) -> bytes:
        reads.append((start, length))
        return pread(handle, length, start)

    monkeypatch.setattr(os, "pread", recorded)
    half, large = JOINED_BYTES // 2, JOINED_BYTES + 1
    starts = [5, 10, 10 + half, 9 + 2 * half, 9, 9 + large, len(data) - 4, len(data)]
    lengths = [5, half, half - 1, 7, large, 3, 4, 0]
    found = storage.get_ranges("a", starts, lengths, len(data))
    assert found == [data[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert reads == [
        (5, 5 + half),
        (10 + half, half + 6),
        (9, large),
        (9 + large, 3),
        (len(data) - 4, 4),
    ]


@pytest.mark.parametrize("lengths", [[4, 3, 3], [4, 8, 3], [11, 1, 1], [4, 0, 9]])
def test_ranges_that_touch_end_where_the_file_ends(storage: Storage, lengths: list[int]) -> None:
    data = b"0123456789"
    storage.put_new("a", data)
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    expected = [data[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert storage.get_ranges("a", starts, lengths) == expected


def test_a_full_disk_is_a_clear_error_and_later_puts_work(storage: Storage) -> None:
    storage.put_new("a/b", b"committed")
    result = subprocess.run(
        [sys.executable, "-c", FILLER, storage.root], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, second, later = result.stdout.splitlines()
    for line in (first, second):
        assert line.startswith(f"{storage.describe('a/large')}: expected to write it; got ")
        assert "File too large" in line
    assert later == "True"
    assert files(storage) == ["a/b", "a/large"]
    assert storage.get("a/b") == b"committed"
    assert storage.get("a/large") == b"y" * 1001


def test_a_full_file_system_is_a_clear_error_and_later_puts_work(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "small", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        storage = Storage(place / "root")
        storage.put_new("a/b", b"committed")
        with pytest.raises(StorageError, match=r"a/large: .*No space left on device.*free space"):
            storage.put_new("a/large", b"x" * 100_000)
        assert files(storage) == ["a/b"]
        assert storage.put_new("a/large", b"y" * 20_000)
        assert storage.get("a/b") == b"committed"
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_file_where_a_folder_should_be_is_a_clear_error(storage: Storage) -> None:
    storage.put_new("cache.json", b"x")
    (storage.folder / "commits").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=r"commits/v000000/a\.json: expected to write it"):
        storage.put_new("commits/v000000/a.json", b"x")
    assert files(storage) == ["cache.json", "commits"]
    (storage.folder / "commits").unlink()
    assert storage.put_new("commits/v000000/a.json", b"x")


@pytest.mark.dist
def test_a_folder_that_may_not_be_written_is_a_clear_error() -> None:
    with tempfile.TemporaryDirectory() as place:
        storage = Storage(Path(place) / "root")
        storage.put_new("a/b", b"committed")
        os.chmod(place, 0o755)
        (storage.folder / "a").chmod(0o555)
        result = subprocess.run(
            [sys.executable, "-c", STRANGER, storage.root],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        expected = rf"{storage.describe('a/c')}: expected to write it; got .*Permission denied"
        assert re.match(expected, result.stdout)
        assert files(storage) == ["a/b"]
        (storage.folder / "a").chmod(0o755)
        assert storage.put_new("a/c", b"x")
