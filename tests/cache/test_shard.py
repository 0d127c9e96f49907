"""Reading shards: what was committed to the bit, or an error that names the object."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit, attempt_path
from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.identity import SHARD_FORMATS
from stillroom.cache.schema import EDGE_OF, Arrays, column_of
from stillroom.cache.shard import Shard
from stillroom.cache.shard_format import shard_format
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import BLOCK_ROWS, CHUNK_ROWS
from tests.cache.conftest import QUICK
from tests.cache.fakes import (
    TOPK,
    commit_shard,
    make_identity,
    make_meta,
    random_arrays,
    same_bits,
)

EDGES = set(EDGE_OF.values())


def make_cache(folder: Path, topk: int, shard_format: str) -> Cache:
    """A cache of any K and format."""
    settings = {"topk": topk, "vocab_size": 100, "logit_width": 100}
    return Cache.create(folder, make_identity(shard_format=shard_format, **settings))


@pytest.fixture(params=SHARD_FORMATS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    """An empty cache of each format in turn."""
    return make_cache(tmp_path / "root", TOPK, request.param)


def file(cache: Cache, commit: Commit, name: str = "") -> Path:
    """A file of an attempt; the shard's object if it is not named."""
    name = name or shard_format(cache.identity.shard_format).object_name
    return Path(cache.storage.root) / attempt_path(commit.part, commit.attempt) / name


def slice_of(arrays: Arrays, start: int, stop: int) -> Arrays:
    """The sequences [start, stop) of a whole shard, edges rebased."""
    out: Arrays = {}
    for name, array in arrays.items():
        per_sequence = len(array) == len(arrays["prompt_length"])
        axis = column_of(name, "sequence" if per_sequence else "position").axis
        if axis == "edge":
            out[name] = array[start : stop + 1].astype(np.int64) - int(array[start])
        elif axis == "sequence":
            out[name] = array[start:stop]
        else:
            edge = arrays[EDGE_OF[axis]]
            out[name] = array[int(edge[start]) : int(edge[stop])]
    return out


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Equal to the bit, column by column; edges by value."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if name in EDGES:
            assert found[name].tolist() == array.tolist(), name
        else:
            assert same_bits(found[name], array), name


@st.composite
def shards(draw: st.DrawFn) -> tuple[Arrays, int]:
    """A random shard and its K."""
    positions = draw(st.one_of(st.integers(1, 50), st.integers(1, 5000)))
    sequences = draw(st.integers(1, min(positions, 60)))
    topk = draw(st.integers(1, 70))
    arrays = random_arrays(draw(st.integers(0, 2**32)), positions, sequences, topk)
    if draw(st.booleans()):
        arrays["x_reward"] = np.linspace(-1, 1, sequences, dtype=np.float32)
        arrays["x_advantage"] = np.linspace(-9, 9, positions, dtype=np.float32)
    return arrays, topk


@pytest.mark.parametrize("form", SHARD_FORMATS)
@settings(QUICK, max_examples=8)
@given(shards(), st.data())
def test_what_was_added_is_read_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    made: tuple[Arrays, int],
    data: st.DataObject,
) -> None:
    arrays, topk = made
    cache = make_cache(tmp_path_factory.mktemp("cache"), topk, form)
    commit = commit_shard(cache, arrays)
    shard = cache.shard(commit)
    sequences = len(arrays["prompt_length"])
    assert (commit.rows, commit.positions) == (sequences, len(arrays["sampled_logprob"]))
    assert_same(shard.all_rows(), arrays)
    for _ in range(3):
        start = data.draw(st.integers(0, sequences))
        stop = data.draw(st.integers(start, sequences))
        assert_same(cache.shard(commit).rows(start, stop), slice_of(arrays, start, stop))
    name = data.draw(st.sampled_from(sorted(arrays)))
    start = data.draw(st.integers(0, len(arrays[name])))
    stop = data.draw(st.integers(start, len(arrays[name]) + 9))
    assert same_bits(shard.read(name, start, stop), arrays[name][start:stop])
    assert same_bits(shard.read(name), arrays[name])


@pytest.mark.parametrize("positions", [CHUNK_ROWS, CHUNK_ROWS + 1, BLOCK_ROWS + 1])
def test_sequences_that_cross_chunks_and_blocks(cache: Cache, positions: int) -> None:
    arrays = random_arrays(positions, positions, sequences=40)
    shard = cache.shard(commit_shard(cache, arrays))
    assert_same(shard.all_rows(), arrays)
    for row in range(40):
        assert_same(shard.rows(row, row + 1), slice_of(arrays, row, row + 1))


def test_several_columns_come_in_one_request(cache: Cache) -> None:
    arrays = random_arrays(0, 5000, 7)
    shard = cache.shard(commit_shard(cache, arrays))
    wanted = [("token", 10, 2500), ("topk_id", 0, 0), ("token", 0, 1), ("group", 2, None)]
    found = shard.read_ranges(wanted)
    for (name, start, stop), array in zip(wanted, found, strict=True):
        assert same_bits(array, arrays[name][start:stop])


def test_columns_are_those_that_were_added(cache: Cache) -> None:
    arrays = random_arrays(0, 20, 3) | {"x_reward": np.ones(3, np.float32)}
    assert set(cache.shard(commit_shard(cache, arrays)).columns) == arrays.keys()


@pytest.fixture
def small(cache: Cache) -> Commit:
    """A shard of some hundred bytes a column."""
    return commit_shard(cache, random_arrays(5, 60, 4) | {"x_reward": np.ones(4, np.float32)})


def test_any_flipped_byte_is_found_or_means_nothing(cache: Cache, small: Commit) -> None:
    path, expected = file(cache, small), cache.shard(small).all_rows()
    data = path.read_bytes()
    manifest = cache.shard(small).manifest
    chunks = [c for e in manifest.arrays.values() for c in e.chunks]
    inside = {i for c in chunks for i in range(c.offset, c.offset + c.length)}
    rng = np.random.default_rng(0)
    for at in rng.choice(len(data), 120, replace=False).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if at in inside:
            with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}, \w+, "):
                cache.shard(small).all_rows()
        else:
            assert_same(cache.shard(small).all_rows(), expected)
    assert 1000 < len(inside) < len(data)


def test_any_flipped_byte_of_the_manifest_is_found(cache: Cache, small: Commit) -> None:
    path = file(cache, small, "manifest.json")
    data = path.read_bytes()
    for at in np.random.default_rng(0).choice(len(data), 150).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}: expected bytes with"):
            cache.shard(small)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.99])
def test_a_truncated_manifest_is_found(cache: Cache, small: Commit, kept: float) -> None:
    path = file(cache, small, "manifest.json")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}"):
        cache.shard(small)


def test_an_object_of_another_length_is_found(cache: Cache, small: Commit) -> None:
    path = file(cache, small)
    data = path.read_bytes()
    for other in [*(data[:length] for length in range(0, len(data), 997)), data + b"0"]:
        path.write_bytes(other)
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}"):
            cache.shard(small).all_rows()


@pytest.mark.parametrize("name", ["", "manifest.json"])
def test_a_missing_object_is_named(cache: Cache, small: Commit, name: str) -> None:
    path = file(cache, small, name)
    path.unlink()
    with pytest.raises(MissingError, match=rf"^{re.escape(str(path))}"):
        cache.shard(small).all_rows()


def test_swapped_chunks_are_found(cache: Cache) -> None:
    arrays = random_arrays(1, 10 * CHUNK_ROWS, 9)
    commit = commit_shard(cache, arrays)
    path = file(cache, commit)
    entries = cache.shard(commit).manifest.arrays
    first, second = entries["rollout_id"].chunks[0], entries["prompt_id"].chunks[0]
    length = min(first.length, second.length)
    assert length > 16, "random numbers do not compress"
    data = bytearray(path.read_bytes())
    for one, other in ((first, second), (second, first)):
        start = other.offset
        data[one.offset : one.offset + length] = path.read_bytes()[start : start + length]
    path.write_bytes(data)
    for name in ("rollout_id", "prompt_id"):
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}, {name}, "):
            cache.shard(commit).read(name)
    assert same_bits(cache.shard(commit).read("topk_id"), arrays["topk_id"])


@pytest.mark.parametrize(
    "names", [[""], ["manifest.json"], ["", "manifest.json"]], ids=["object", "manifest", "both"]
)
def test_swapped_objects_of_two_parts_are_found(cache: Cache, names: list[str]) -> None:
    commits = [commit_shard(cache, random_arrays(seed, 60, 4), seed) for seed in (0, 1)]
    for name in names:
        one, other = (file(cache, commit, name) for commit in commits)
        one.rename(one.with_suffix(".old"))
        other.rename(one)
        one.with_suffix(".old").rename(other)
    for commit in commits:
        path = file(cache, commit, names[-1])
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}"):
            cache.shard(commit).all_rows()


def forge(cache: Cache, commit: Commit, change: Callable[[dict[str, Any]], None]) -> Shard:
    """Open a shard whose manifest was changed by one who could write the commit too."""
    path = file(cache, commit, "manifest.json")
    value = json.loads(path.read_bytes())
    change(value)
    data = json.dumps(value).encode()
    path.write_bytes(data)
    return cache.shard(replace(commit, manifest_hash=jsonfile.digest(data)))


def _more_rows(value: dict[str, Any]) -> None:
    value["arrays"]["topk_logprob"]["shape"][0] += 1


def _wider(value: dict[str, Any]) -> None:
    value["arrays"]["topk_logprob"]["shape"][1] = 2**30


def _extra_array(value: dict[str, Any]) -> None:
    value["arrays"]["extra_id"] = value["arrays"]["topk_logprob"]


def _missing_array(value: dict[str, Any]) -> None:
    del value["arrays"]["scored"]


def _longer_user_column(value: dict[str, Any]) -> None:
    value["arrays"]["x_reward"]["shape"] = [5]


def _user_column_of_another_axis(value: dict[str, Any]) -> None:
    value["attributes"]["user_axes"]["x_reward"] = "position"


def _other_dtype(value: dict[str, Any]) -> None:
    value["arrays"]["x_reward"]["dtype"] = "uint32"


def _fewer_chunks(value: dict[str, Any]) -> None:
    value["arrays"]["x_reward"]["chunks"] = []


@pytest.mark.parametrize(
    "change",
    [
        _more_rows,
        _wider,
        _extra_array,
        _missing_array,
        _longer_user_column,
        _user_column_of_another_axis,
        _other_dtype,
        _fewer_chunks,
    ],
)
def test_a_manifest_of_another_shard_is_refused_at_opening(
    cache: Cache, small: Commit, change: Callable[[dict[str, Any]], None]
) -> None:
    path = file(cache, small)
    with pytest.raises(CorruptError, match=rf"^{re.escape(str(path.parent))}"):
        forge(cache, small, change)


def test_offsets_that_are_none_are_refused(tmp_path: Path) -> None:
    edge = "teacher_prompt_start"

    def swap(value: dict[str, Any]) -> None:
        value["arrays"][edge]["chunks"] = value["arrays"]["group"]["chunks"]

    cache = make_cache(tmp_path, TOPK, "zarr")
    shard = forge(cache, commit_shard(cache, random_arrays(5, 60, 4)), swap)
    with pytest.raises(CorruptError, match=rf"{edge}: expected offsets from 0 up to \d+"):
        shard.all_rows()


def test_a_commit_of_another_size_is_refused(cache: Cache, small: Commit) -> None:
    for field in ("rows", "positions", "tokens", "teacher_prompt_tokens"):
        wrong = replace(small, **{field: getattr(small, field) + 1})
        with pytest.raises(CorruptError, match="expected shapes"):
            cache.shard(wrong)


def test_a_commit_of_another_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    settings = {"topk": TOPK, "vocab_size": 100, "logit_width": 100, "temperature": 2.0}
    other = Cache.create(tmp_path / "other", make_identity(**settings))
    commit = commit_shard(other, random_arrays(0, 20, 2))
    with pytest.raises(MismatchError, match=rf"^commit {make_meta().name}\.0"):
        cache.shard(commit)
