"""Objects below a root: put if absent, durable, and never outside."""

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    ForkedError,
    MissingError,
    StorageError,
)
from stillroom.cache.storage import Entry, Storage
from tests.cache.fakes import LostReply
from tests.cache.s3 import QUICKLY, S3

BAD_PATHS = [
    "",
    "/x",
    "../x",
    "a/../../x",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a/./b",
    "a\n",
    "a\0b",
    "-a",
    "~",
    "a b",
    "ä",
    "a\\b",
]
PUTTER = """
import sys, time
from pathlib import Path
from stillroom.cache.storage import Entry, Storage
root, name = sys.argv[1:]
storage = Storage(root)
print("ready", flush=True)
sys.stdin.readline()
print(" ".join(str(i) for i in range(60) if storage.put_new(f"a/b{i % 7}/k{i}", name.encode())))
"""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A storage whose root does not exist yet."""
    return Storage(tmp_path / "root")


@pytest.fixture(params=["local", "memory", "s3"])
def either(request: pytest.FixtureRequest, storage: Storage) -> Storage:
    """A storage in a folder, one in memory, and one on an S3 server."""
    if request.param == "local":
        return storage
    if request.param == "memory":
        return Storage("memory:///")
    s3: S3 = request.getfixturevalue("s3")
    return Storage(s3.new_root(), **QUICKLY)


def folder(storage: Storage) -> Path:
    """The root of a local storage."""
    return Path(storage.root)


def sizes(entries: list[Entry]) -> dict[str, int]:
    """Path to size of a listing."""
    return {entry.path: entry.size_bytes for entry in entries}


def test_a_first_put_wins_and_stays(either: Storage) -> None:
    assert either.put_new("a/b.json", b"first")
    assert not either.put_new("a/b.json", b"second")
    assert either.get("a/b.json") == b"first"
    assert either.size("a/b.json") == 5
    assert either.exists("a/b.json")


def test_an_object_larger_than_its_kind_is_refused(either: Storage) -> None:
    either.put_new("a/b", b"0123456789")
    assert either.get("a/b", 10) == b"0123456789"
    message = f"{re.escape(either.describe('a/b'))}: expected at most 9 bytes; got 10 bytes"
    with pytest.raises(CorruptError, match=message):
        either.get("a/b", 9)
    found = either.get_many(["a/b", "a/c"], 9)
    assert [type(one) for one in found] == [CorruptError, MissingError]
    assert either.get_many(["a/b"], 10) == [b"0123456789"]


def test_a_file_that_is_too_large_is_not_read(storage: Storage) -> None:
    storage.put_new("a", b"")
    os.truncate(folder(storage) / "a", 1 << 40)
    with pytest.raises(CorruptError, match=f"at most 100 bytes; got {1 << 40} bytes"):
        storage.get("a", 100)


def test_a_put_leaves_no_other_file(storage: Storage) -> None:
    storage.put_new("a/b.json", b"first")
    storage.put_new("a/b.json", b"second")
    assert [path.name for path in (folder(storage) / "a").iterdir()] == ["b.json"]


def test_of_many_threads_one_wins_each_key(storage: Storage) -> None:
    keys, threads = [f"x/y{i % 3}/{i}" for i in range(20)], 6
    won: list[tuple[str, int]] = []
    start = threading.Barrier(threads)

    def put(me: int) -> None:
        start.wait()
        won.extend((key, me) for key in keys if storage.put_new(key, bytes([me]) * 1000))

    workers = [threading.Thread(target=put, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(key for key, _ in won) == sorted(keys)
    assert all(storage.get(key) == bytes([me]) * 1000 for key, me in won)


@pytest.mark.dist
def test_of_two_processes_one_wins_each_key(storage: Storage) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PUTTER, storage.root, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "pq"
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    won = {}
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for name, child in zip("pq", children, strict=True):
        out, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        won[name] = set(map(int, out.split()))
    assert won["p"] | won["q"] == set(range(60))
    assert not won["p"] & won["q"]
    assert all(storage.get(f"a/b{i % 7}/k{i}") == name.encode() for name in "pq" for i in won[name])


def test_what_is_not_there_is_missing(either: Storage) -> None:
    either.put_new("a/b", b"")
    assert either.get("a/b") == b""
    for path in ("c", "a/c", "a"):
        assert not either.exists(path)
        with pytest.raises(MissingError, match=re.escape(either.describe(path))):
            either.get(path)
        with pytest.raises(MissingError):
            either.get_ranges(path, [0], [1])
    assert either.list("c") == []


def test_a_root_that_is_not_there_is_empty(either: Storage) -> None:
    assert either.list("commits") == []
    assert not either.exists("cache.json")
    with pytest.raises(MissingError):
        either.get("cache.json")


def test_a_root_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(tmp_path / "file" / "root")
    with pytest.raises(StorageError, match="to write it"):
        storage.put_new("a/b", b"x")
    assert not storage.exists("a/b")


def test_a_put_below_an_object_fails(storage: Storage) -> None:
    storage.put_new("a", b"x")
    with pytest.raises(StorageError):
        storage.put_new("a/b", b"y")
    assert storage.get("a") == b"x"


CALLS: dict[str, Callable[[Storage, str], object]] = {
    "put": lambda storage, path: storage.put(path, b"x"),
    "delete": lambda storage, path: storage.delete(path),
    "put_new": lambda storage, path: storage.put_new(path, b"x"),
    "get": lambda storage, path: storage.get(path),
    "get_ranges": lambda storage, path: storage.get_ranges(path, [0], [1]),
    "size": lambda storage, path: storage.size(path),
    "list": lambda storage, path: storage.list(path),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_could_leave_the_root_is_refused(
    storage: Storage, path: str, call: Callable[[Storage, str], object]
) -> None:
    (folder(storage).parent / "x").write_bytes(b"outside")
    storage.put_new("a/b", b"inside")
    with pytest.raises(StorageError, match="a plain relative path"):
        call(storage, path)
    assert (folder(storage).parent / "x").read_bytes() == b"outside"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("target", ["outside", "nowhere", "root/inside"])
def test_a_symbolic_link_below_the_root_is_refused(
    storage: Storage, target: str, call: Callable[[Storage, str], object]
) -> None:
    outside = folder(storage).parent / "outside"
    outside.mkdir()
    (outside / "b").write_bytes(b"outside")
    storage.put_new("inside/b", b"inside")
    (folder(storage) / "link").symlink_to(folder(storage).parent / target)
    (folder(storage) / "inside" / "link").symlink_to(outside / "b")
    for path in ("link", "link/b", "link/new", "inside/link"):
        with pytest.raises(StorageError, match="no symbolic link below the root"):
            call(storage, path)
    assert [path.name for path in outside.iterdir()] == ["b"]


def test_the_root_itself_may_be_a_link(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    folder(storage).symlink_to(tmp_path / "real")
    assert storage.put_new("a/b", b"x")
    assert storage.get("a/b") == b"x"
    assert sizes(storage.list("a")) == {"a/b": 1}


def test_a_root_may_be_a_file_address_or_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Storage(f"file://{tmp_path}/root").put_new("a", b"x")
    assert Storage("~/root").get("a") == b"x"
    assert Storage("~/root").folder == tmp_path / "root"
    with pytest.raises(ConfigError, match="~nobody-of-that-name/root"):
        Storage("~nobody-of-that-name/root")


def test_a_listing_is_sorted_and_ignores_what_is_not_ours(storage: Storage) -> None:
    for path in ("a/c", "a/b/z", "a/b.json", "ab/c"):
        storage.put_new(path, b"12")
    for path in ("a/.0123.tmp", "a/.tmp/x", "a/with space", "a/b~"):
        (folder(storage) / path).parent.mkdir(exist_ok=True)
        (folder(storage) / path).write_bytes(b"x")
    (folder(storage) / "a" / "b~link").symlink_to(folder(storage))
    listed = storage.list("a")
    assert [entry.path for entry in listed] == ["a/b.json", "a/b/z", "a/c"]
    assert sizes(listed) == {"a/b.json": 2, "a/b/z": 2, "a/c": 2}


def test_a_prefix_is_a_folder(either: Storage) -> None:
    for path in ("a/c", "ab/c", "a/b/z"):
        either.put_new(path, b"12")
    assert sizes(either.list("a")) == {"a/b/z": 2, "a/c": 2}
    assert [entry.path for entry in either.list("a")] == ["a/b/z", "a/c"]


def test_a_listing_says_when_an_object_was_written(either: Storage) -> None:
    before = either.now()
    either.put_new("a/first", b"x")
    (first,) = either.list("a")
    either.put("a/first", b"y")
    (again,) = either.list("a")
    assert before <= first.modified <= again.modified <= either.now()


def test_an_entry_is_that_of_the_listing(either: Storage) -> None:
    either.put_new("a/b", b"12")
    (listed,) = either.list("a")
    found = either.entry("a/b")
    assert found is not None
    assert (found, int(found.modified)) == (listed, int(listed.modified))
    assert either.entry("a/c") is None
    assert either.entry("a") is None


def test_asking_for_the_time_leaves_at_most_what_gc_collects(either: Storage) -> None:
    either.put_new("a", b"x")
    either.now()
    left = [entry.path for entry in either.list_all() if entry.path != "a"]
    assert left == [entry.path for entry in either.list("probe")]
    assert len(left) == (0 if either.is_local else 1)
    assert either.temporaries() == []


def test_put_overwrites(either: Storage) -> None:
    either.put("claims/a", b"first")
    either.put("claims/a", b"second, longer")
    assert either.get("claims/a") == b"second, longer"
    assert sizes(either.list("claims")) == {"claims/a": 14}
    assert either.temporaries() == []


def test_what_is_deleted_is_gone_and_can_be_written_again(either: Storage) -> None:
    for path in ("a/b/c", "a/b/d", "e"):
        either.put_new(path, b"x")
    either.delete("a/b/c")
    assert sizes(either.list("a")) == {"a/b/d": 1}
    for path in ("a/b/c", "a/b/d", "e", "a/b/d", "never/was", "e/below"):
        either.delete(path)
    assert either.list("a") == []
    assert not either.exists("e")
    assert either.put_new("a/b/c", b"new")
    assert either.get("a/b/c") == b"new"


def test_many_objects_come_in_order_and_an_error_is_one_of_them(either: Storage) -> None:
    paths = [f"a/{i}" for i in range(40)]
    for path in paths:
        either.put_new(path, path.encode())
    asked = [*reversed(paths), "a/none", *paths]
    found = either.get_many(asked)
    missing = found.pop(40)
    assert isinstance(missing, MissingError)
    assert missing.where == either.describe("a/none")
    assert found == [path.encode() for path in asked if path != "a/none"]
    assert either.get_many([]) == []


def test_ranges_come_in_the_order_asked(either: Storage) -> None:
    data = bytes(range(256)) * 40
    either.put_new("a", data)
    starts, lengths = [9000, 0, 5, 5, 10_239], [100, 3, 1, 4, 1]
    expected = [data[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert either.get_ranges("a", starts, lengths) == expected
    assert either.get_ranges("a", [], []) == []


def test_ranges_past_the_end_are_short(either: Storage) -> None:
    either.put_new("a", b"0123456789")
    assert either.get_ranges("a", [2, 8, 10, 99], [2, 5, 1, 1]) == [b"23", b"89", b"", b""]
    assert either.get_ranges("a", [12, 1 << 40], [2, 5]) == [b"", b""]
    assert either.get_ranges("a", [8], [1 << 40]) == [b"89"]
    either.put_new("empty", b"")
    assert either.get_ranges("empty", [0, 3], [2, 0]) == [b"", b""]


@pytest.mark.parametrize("size", [9, 11, 100])
@pytest.mark.parametrize("start", [0, 8, 50])
def test_an_object_of_another_size_is_damaged(either: Storage, size: int, start: int) -> None:
    either.put_new("a/b", b"0123456789")
    assert either.get_ranges("a/b", [8], [2], 10) == [b"89"]
    message = rf"{re.escape(either.describe('a/b'))}: expected an object of {size} bytes; got 10"
    with pytest.raises(CorruptError, match=message):
        either.get_ranges("a/b", [start], [1], size)


def test_the_probe_passes(either: Storage) -> None:
    either.probe()
    either.probe()
    assert len(either.list("probe")) == 2


class Overwriting(Storage):
    """A storage that ignores the condition of a put."""

    claims = True
    """What it says of a second put."""

    def put_new(self, path: str, data: bytes) -> bool:
        """Write whatever is there."""
        target = Path(self.root) / path
        first = not target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return first or self.claims


@pytest.mark.parametrize("claims", [True, False])
def test_the_probe_finds_a_storage_that_overwrites(tmp_path: Path, claims: bool) -> None:
    storage = Overwriting(tmp_path)
    storage.claims = claims
    with pytest.raises(StorageError, match=r"a second put of the same key to be refused.*b'second"):
        storage.probe()


def test_only_an_address_is_probed_again(storage: Storage) -> None:
    storage.check_conditional_puts()
    assert storage.list("probe") == []
    remote = Storage("memory:///")
    remote.check_conditional_puts()
    assert len(remote.list("probe")) == 1


def test_the_probe_finds_a_storage_that_refuses_the_first_put(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="first put False, second put False, content None"):
        LostReply(tmp_path, "probe", "exists", effective=False).probe()


def test_the_probe_minds_no_lost_reply(tmp_path: Path) -> None:
    LostReply(tmp_path, "probe", "exists").probe()


@pytest.mark.dist
@pytest.mark.parametrize("call", CALLS)
def test_a_forked_child_may_not_use_it(storage: Storage, call: str) -> None:
    storage.put_new("a/b", b"x")
    path = {"put_new": "a/c", "put": "a/c", "list": "a"}.get(call, "a/b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
        child = os.fork()
    if child == 0:
        try:
            CALLS[call](storage, path)
        except ForkedError:
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not storage.exists("a/c")
    assert storage.exists("a/b")


def test_messages_name_the_object(tmp_path: Path) -> None:
    assert Storage(tmp_path).describe("a/b") == f"{tmp_path}/a/b"
    assert Storage("s3://bucket/prefix").describe("a/b") == "s3://bucket/prefix/a/b"


def test_a_root_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        Storage("a\0b")
