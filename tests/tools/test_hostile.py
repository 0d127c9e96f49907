"""Caches that somebody made up: every hash fits, but what they say is absurd. Verification reports
it, and neither crashes nor takes memory far beyond the bytes that are there."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, standalone

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path
from stillroom.cache.errors import StillroomError
from stillroom.cache.store import Cache
from stillroom.tools.findings import Report
from stillroom.tools.verify import verify
from tests.tools.small_cache import LIVE, attempt, edit, fill, make_cache, shard_object

MEGABYTE = 1 << 20
MOST_BYTES = 64 * MEGABYTE
QUICK = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["../../etc/passwd", "/", "0" * 32, LIVE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with an object of every kind."""
    root = tmp_path_factory.mktemp("made") / "cache"
    fill(make_cache(root, "zarr"))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "cache")


def look(root: Path, **settings: Any) -> Report:
    """Verify, and see how much memory it takes."""
    tracemalloc.start()
    try:
        report = verify(Cache.open(root), deep=True, threads=1, **settings)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert report.errors == []
    return report


def forge(
    root: Path,
    *,
    manifest: Callable[[dict[str, Any]], object] = lambda value: None,
    commit: Callable[[dict[str, Any]], object] = lambda value: None,
    more: bytes = b"",
) -> None:
    """Change what a part's manifest and commit say, and make all hashes and sizes fit again; `more`
    is put at the end of the shard's object."""
    path, shard = attempt(root, LIVE) / "manifest.json", shard_object(root, LIVE)
    data = shard.read_bytes() + more
    shard.write_bytes(data)
    value = json.loads(path.read_bytes())
    value |= {"size": len(data), "hash": jsonfile.digest(data)}
    manifest(value)
    path.write_bytes(jsonfile.dump(value))

    def sign(value: dict[str, Any]) -> None:
        commit(value)
        value["manifest_hash"] = jsonfile.digest(path.read_bytes())
        value["stored_bytes"] = len(data) + path.stat().st_size

    edit(root / commit_path(LIVE, 0), sign)


def claim_tokens(root: Path, count: int, chunks: int) -> None:
    """Say that there are so many tokens, in chunks that are all the same one."""

    def manifest(value: dict[str, Any]) -> None:
        for name in ("token", "scored"):
            entry = value["arrays"][name]
            entry["shape"], entry["chunks"] = [count], entry["chunks"][:1] * chunks

    forge(root, manifest=manifest, commit=lambda value: value.update(tokens=count))


def test_an_honest_forgery_is_sound(root: Path) -> None:
    forge(root, more=b"")
    report = look(root, part=LIVE)
    assert report.findings == []


@pytest.mark.parametrize(("count", "chunks"), [(2**39, 1), (2**47, 4), (2048 * 3000, 3000)])
def test_a_shard_that_claims_to_be_huge(root: Path, count: int, chunks: int) -> None:
    claim_tokens(root, count, chunks)
    assert any(finding.shard == (LIVE, 0) for finding in look(root, part=LIVE).findings)


def test_a_chunk_that_inflates(root: Path) -> None:
    chunk = bytes(standalone.simple_compress(np.zeros(20_000_000, np.uint32), ChunkConfig()))
    assert len(chunk) < MEGABYTE
    start = shard_object(root, LIVE).stat().st_size

    def manifest(value: dict[str, Any]) -> None:
        value["arrays"]["token"]["chunks"] = [[start, len(chunk), jsonfile.digest(chunk)]]

    forge(root, manifest=manifest, more=chunk)
    problems = [finding.problem for finding in look(root, part=LIVE).findings]
    assert any(problem.startswith("token, chunk 0: expected") for problem in problems), problems


@pytest.mark.parametrize(
    "change",
    [
        {"id_groups": 2**62},
        {"id_groups": "x"},
        {"id_group_width": -1},
        {"user_axes": {"x_reward": "token"}},
        {"user_axes": []},
        {"part": "v000000-" + "9" * 16},
        {"sampler": {"temperature": 9.0}},
        {"sampler": "x" * MEGABYTE},
        {"temperature": None},
    ],
    ids=str,
)
def test_attributes_that_do_not_fit(root: Path, change: dict[str, Any]) -> None:
    forge(root, manifest=lambda value: value["attributes"].update(change))
    assert any(finding.shard == (LIVE, 0) for finding in look(root, part=LIVE).findings)


@pytest.mark.parametrize(
    "change",
    [{"attempt": "../" * 10 + "ab"}, {"part": "../x"}, {"rows": 2**40}, {"positions": -1},
     {"row_table": "A" * MEGABYTE}, {"n": True}, {"scorer": []}],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_a_commit_that_points_elsewhere_or_counts_wrong(root: Path, change: dict[str, Any]) -> None:
    edit(root / commit_path(LIVE, 0), lambda value: value.update(change))
    findings = look(root, part=LIVE).findings
    assert any(finding.object == commit_path(LIVE, 0) for finding in findings), findings


BOMBS = [
    b'{"a":' + b"[" * 100_000,
    b'{"a":[' + b"[]," * 60_000 + b"[]]}",
    b'{"a":' + b"9" * 100_000 + b"}",
    b'{"a":1e999}',
    b"\xff\xfe\x00",
    b"null",
    bytes(MEGABYTE),
]


def sealed(bomb: bytes) -> bytes:
    """With the hash that it should have."""
    return bomb[:-1] + f',"{jsonfile.SEAL}":"{jsonfile.digest(bomb[:-1])}"}}'.encode()


@pytest.mark.parametrize("seal", [bytes, sealed], ids=["plain", "sealed"])
@pytest.mark.parametrize("bomb", range(len(BOMBS)))
def test_bombs_in_place_of_every_file(
    root: Path, bomb: int, seal: Callable[[bytes], bytes]
) -> None:
    paths = [p for p in sorted(root.rglob("*")) if p.is_file() and p.parent != root]
    for path in paths:
        if path.parent.name != "probe":
            path.write_bytes(seal(BOMBS[bomb]))
    found = {finding.object for finding in look(root).findings}
    wrong = [str(p.relative_to(root)) for p in paths if p.parent.name not in ("probe", "e" * 32)]
    aside = {"shard.zarr.zip", "manifest.json"}
    assert not [path for path in wrong if path not in found and path.split("/")[-1] not in aside]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in parsed JSON."""
    keys: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = list(enumerate(value[:3]))
    return [path, *(place for key, inner in keys for place in places(inner, (*path, key)))]


@QUICK
@given(st.data())
def test_any_value_anywhere_in_a_small_file(made: Path, data: st.DataObject) -> None:
    files = [p for p in sorted(made.rglob("*.json")) if "e" * 32 not in str(p)]
    path = data.draw(st.sampled_from(files))
    stored, sealed = path.read_bytes(), path.name != "manifest.json"
    value = json.loads(stored)
    value.pop("xxh3_128", None)
    *outer, key = data.draw(st.sampled_from(places(value)[1:]))
    inner: Any = value
    for step in outer:
        inner = inner[step]
    inner[key] = data.draw(JSON)
    try:
        path.write_bytes(jsonfile.dump_sealed(value) if sealed else jsonfile.dump(value))
        with suppress(StillroomError) if path.name == "cache.json" else nullcontext():
            verify(Cache.open(made), deep=True, threads=1)
    finally:
        path.write_bytes(stored)


@QUICK
@given(st.data())
def test_any_value_in_a_manifest_that_is_committed(made: Path, data: st.DataObject) -> None:
    path = attempt(made, LIVE) / "manifest.json"
    commit = made / commit_path(LIVE, 0)
    stored, committed = path.read_bytes(), commit.read_bytes()
    value = json.loads(stored)
    *outer, key = data.draw(st.sampled_from(places(value)[1:]))
    inner: Any = value
    for step in outer:
        inner = inner[step]
    inner[key] = data.draw(JSON)
    try:
        path.write_bytes(jsonfile.dump(value))
        digest = jsonfile.digest(path.read_bytes())
        edit(commit, lambda fields: fields.update(manifest_hash=digest))
        report = verify(Cache.open(made), deep=True, part=LIVE, threads=1)
        assert report.errors == []
    finally:
        path.write_bytes(stored)
        commit.write_bytes(committed)
