"""Whatever happens to any object: deep verification names it, and readers give the right values or
an error that names it, never others."""

import pickle
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path
from stillroom.cache.errors import StillroomError
from stillroom.cache.manifest import Manifest
from stillroom.cache.store import Cache
from stillroom.replay import ReplayStream, Source, StreamConfig
from stillroom.tools.verify import verify
from tests.tools.small_cache import FORMATS, LIVE, OTHER, attempt, make_cache, shard_object

PER_FILE = 3
"""Bits flipped in each small file, in the quick tests."""


@pytest.fixture(scope="module", params=FORMATS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two parts and a snapshot, in each format."""
    root = tmp_path_factory.mktemp("made") / "cache"
    make_cache(root, request.param)
    for claim in (root / "claims").iterdir():
        claim.unlink()
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(made, tmp_path / "cache")


def objects(root: Path) -> list[Path]:
    """Every object whose content means something."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [path for path in files if path.parent.name != "probe"]


def readings(root: Path) -> dict[str, Callable[[], bytes]]:
    """Ways to read a cache, as digests of all that they give."""
    [snapshot] = [path.stem for path in (root / "snapshots").glob("*")][:1] or ["0" * 32]

    def read(part: str) -> bytes:
        return _digest(Cache.open(root).read(part))

    def stream() -> bytes:
        cache = Cache.open(root)
        opened = cache.open_snapshot(snapshot)
        config = StreamConfig(batch_rows=4, max_tokens=64, block_rows=2, window_rows=2)
        batches = ReplayStream(Source(cache, opened), config)
        return _digest([opened, [batch for batch, _ in zip(batches, range(2), strict=False)]])

    return {LIVE: lambda: read(LIVE), OTHER: lambda: read(OTHER), "stream": stream}


def _digest(value: object) -> bytes:
    return jsonfile.digest(pickle.dumps(value)).encode()


def check(root: Path, right: dict[str, bytes], *names: str) -> None:
    """Damage to objects of these names is found, and gives no reader a wrong value."""
    try:
        report = verify(Cache.open(root), deep=True, threads=1)
        assert report.errors == []
        found = {finding.object for finding in report.findings}
    except StillroomError as error:
        found = {error.where}
    assert any(name in where for name in names for where in found), (names, found)
    for name, reading in readings(root).items():
        message = ""
        try:
            value = reading()
        except StillroomError as error:
            message = str(error)
        said = any(name in message or _attempt(name) in message for name in names)
        assert said if message else value == right[name], (name, names, message)


def _attempt(name: str) -> str:
    """What a reader names that only lists a shard: the folder of its objects."""
    return name.rpartition("/")[0] if name.startswith("scores/") else name


@pytest.fixture
def right(made: Path) -> dict[str, bytes]:
    """What a sound cache gives."""
    return {name: reading() for name, reading in readings(made).items()}


def flips(path: Path, places: Iterable[int]) -> Iterator[None]:
    """The file with one bit flipped, in one place after another."""
    data = path.read_bytes()
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        yield
    path.write_bytes(data)


def regions(root: Path, part: str) -> list[int]:
    """A byte of each chunk of a shard, and of each gap between chunks."""
    folder = attempt(root, part)
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes(), "manifest")
    chunks = {chunk for entry in manifest.arrays.values() for chunk in entry.chunks}
    spans = sorted((chunk.offset, chunk.length) for chunk in chunks)
    ends = [0, *(offset + length for offset, length in spans)]
    starts = [*(offset for offset, _ in spans), manifest.size]
    gaps = [(a, b - a) for a, b in zip(ends, starts, strict=True) if b > a]
    rng = random.Random(0)
    return [offset + rng.randrange(length) for offset, length in [*spans, *gaps]]


def test_a_bit_of_every_small_file(root: Path, right: dict[str, bytes]) -> None:
    rng = random.Random(0)
    for path in objects(root):
        if "shard." not in path.name:
            size = path.stat().st_size
            for _ in flips(path, [rng.randrange(size) for _ in range(PER_FILE)]):
                check(root, right, str(path.relative_to(root)))


def test_a_bit_of_every_region_of_a_shard(root: Path, right: dict[str, bytes]) -> None:
    path = shard_object(root, LIVE)
    for _ in flips(path, regions(root, LIVE)[::2]):
        check(root, right, str(path.relative_to(root)))


@pytest.mark.slow
def test_a_bit_of_every_byte_of_a_commit_and_the_identity(
    root: Path, right: dict[str, bytes]
) -> None:
    for path in (root / "cache.json", root / commit_path(LIVE, 0)):
        for _ in flips(path, range(path.stat().st_size)):
            check(root, right, str(path.relative_to(root)))


@pytest.mark.slow
def test_bits_all_over_every_object(root: Path, right: dict[str, bytes]) -> None:
    for path in objects(root):
        size = path.stat().st_size
        for _ in flips(path, range(0, size, max(1, size // 50))):
            check(root, right, str(path.relative_to(root)))


@pytest.mark.slow
def test_a_bit_of_all_regions(root: Path, right: dict[str, bytes]) -> None:
    for part in (LIVE, OTHER):
        path = shard_object(root, part)
        for _ in flips(path, regions(root, part)):
            check(root, right, str(path.relative_to(root)))


def test_an_object_cut_emptied_or_gone(root: Path, right: dict[str, bytes]) -> None:
    kinds = {path.parts[len(root.parts)]: path for path in objects(root)}
    chosen = {*kinds.values(), shard_object(root, LIVE), attempt(root, LIVE) / "manifest.json"}
    for path in sorted(chosen):
        data = path.read_bytes()
        for other in (data[: len(data) // 2], b""):
            path.write_bytes(other)
            check(root, right, str(path.relative_to(root)))
        path.unlink()
        if path.parent.name not in ("canary", "snapshots"):  # nothing says that they were there
            check(root, right, str(path.relative_to(root)), path.name.split(".")[0])
        path.write_bytes(data)


def test_objects_of_two_parts_swapped(root: Path, right: dict[str, bytes]) -> None:
    pairs = [(shard_object(root, part) for part in (LIVE, OTHER))]
    pairs += [(attempt(root, part) / "manifest.json" for part in (LIVE, OTHER))]
    pairs += [(path for path in sorted(root.rglob("commits/*/*.json")))]
    pairs += [(path for path in sorted(root.glob("rollouts/*")))]
    for one, other in pairs:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        check(root, right, *(str(path.relative_to(root)) for path in (one, other)))
        one.write_bytes(first)
        other.write_bytes(second)


def test_an_object_copied_under_another_name(root: Path, right: dict[str, bytes]) -> None:
    for path in objects(root):
        other = path.with_name(path.name.replace("0", "1", 1).replace("shard", "shard2"))
        other = other if other != path else path.with_name("a" + path.name)
        shutil.copy(path, other)
        check(root, right, *(str(name.relative_to(root)) for name in (other, path)))
        other.unlink()
