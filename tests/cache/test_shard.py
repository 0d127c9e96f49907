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
from stillroom.cache.manifest import BLOCK_ROWS, CHUNK_ROWS, OBJECT_NAME
from stillroom.cache.schema import EDGE_OF, Arrays, column_of
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
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


def make_cache(folder: Path, topk: int) -> Cache:
    """A cache of any K; ids are not looked at here."""
    return Cache.create(folder, make_identity(topk=topk, vocab_size=100, logit_width=100))


def file(cache: Cache, commit: Commit, name: str = OBJECT_NAME) -> Path:
    """A file of an attempt."""
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


@settings(QUICK, max_examples=20)
@given(shards(), st.data())
def test_what_was_added_is_read_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[Arrays, int], data: st.DataObject
) -> None:
    arrays, topk = made
    cache = make_cache(tmp_path_factory.mktemp("cache"), topk)
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


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("positions", [2048, 2049, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_block_and_chunk_borders(tmp_path: Path, positions: int, topk: int) -> None:
    arrays = random_arrays(positions, positions, sequences=40, topk=topk)
    cache = make_cache(tmp_path, topk)
    shard = cache.shard(commit_shard(cache, arrays))
    assert_same(shard.all_rows(), arrays)
    for row in range(40):
        assert_same(shard.rows(row, row + 1), slice_of(arrays, row, row + 1))
    border = positions // CHUNK_ROWS * CHUNK_ROWS
    for start, stop in [(border - 1, border), (border, border), (border - 1, border + 1)]:
        assert same_bits(shard.read("topk_id", start, stop), arrays["topk_id"][start:stop])


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


def test_any_flipped_byte_of_a_chunk_is_found(cache: Cache, small: Commit) -> None:
    path, expected = file(cache, small), cache.shard(small).all_rows()
    data = path.read_bytes()
    chunks = [c for e in cache.shard(small).manifest.arrays.values() for c in e.chunks]
    inside = [i for c in chunks for i in range(c.offset, c.offset + c.length)]
    rng = np.random.default_rng(0)
    firsts, lasts = [c.offset for c in chunks], [c.offset + c.length - 1 for c in chunks]
    for at in [*firsts, *lasts, *rng.choice(inside, 150).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}, \w+, chunk 0: "):
            cache.shard(small).all_rows()
    outside = sorted(set(range(len(data))) - set(inside))
    for at in rng.choice(outside, 30).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        assert_same(cache.shard(small).all_rows(), expected)


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


def test_an_object_cut_off_inside_its_chunks_is_found(cache: Cache, small: Commit) -> None:
    path = file(cache, small)
    data = path.read_bytes()
    last = max(
        c.offset + c.length for e in cache.shard(small).manifest.arrays.values() for c in e.chunks
    )
    for length in range(0, last, 211):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}"):
            cache.shard(small).all_rows()


@pytest.mark.parametrize("name", [OBJECT_NAME, "manifest.json"])
def test_a_missing_object_is_named(cache: Cache, small: Commit, name: str) -> None:
    path = file(cache, small, name)
    path.unlink()
    with pytest.raises(MissingError, match=rf"^{re.escape(str(path))}"):
        cache.shard(small).all_rows()


def test_swapped_chunks_are_found(cache: Cache) -> None:
    arrays = random_arrays(1, 3 * CHUNK_ROWS, 4)
    commit = commit_shard(cache, arrays)
    path, chunks = file(cache, commit), cache.shard(commit).manifest.arrays["topk_id"].chunks
    first, second = chunks[0], chunks[1]
    assert first.length == second.length, "random ids do not compress"
    data = bytearray(path.read_bytes())
    one = data[first.offset : first.offset + first.length]
    data[first.offset : first.offset + first.length] = data[
        second.offset : second.offset + second.length
    ]
    data[second.offset : second.offset + second.length] = one
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}, topk_id, chunk 0"):
        cache.shard(commit).all_rows()
    assert same_bits(cache.shard(commit).read("topk_id", 2 * CHUNK_ROWS), arrays["topk_id"][4096:])


@pytest.mark.parametrize(
    "names", [[OBJECT_NAME], ["manifest.json"], [OBJECT_NAME, "manifest.json"]]
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
    value["arrays"]["topk_id"]["shape"][0] += 1


def _wider(value: dict[str, Any]) -> None:
    value["arrays"]["topk_id"]["shape"][1] = 2**40


def _extra_array(value: dict[str, Any]) -> None:
    value["arrays"]["extra_id"] = value["arrays"]["topk_id"]


def _missing_array(value: dict[str, Any]) -> None:
    del value["arrays"]["scored"]


def _longer_user_column(value: dict[str, Any]) -> None:
    value["arrays"]["x_reward"]["shape"] = [5]


def _wide_user_column(value: dict[str, Any]) -> None:
    value["arrays"]["x_reward"]["shape"] = [4, 2**40]


def _user_column_of_another_axis(value: dict[str, Any]) -> None:
    value["attributes"]["user_axes"]["x_reward"] = "position"


@pytest.mark.parametrize(
    "change",
    [
        _more_rows,
        _wider,
        _extra_array,
        _missing_array,
        _longer_user_column,
        _wide_user_column,
        _user_column_of_another_axis,
    ],
)
def test_a_manifest_of_other_shapes_is_refused_at_opening(
    cache: Cache, small: Commit, change: Callable[[dict[str, Any]], None]
) -> None:
    path = file(cache, small, "manifest.json")
    with pytest.raises(CorruptError, match=rf"^{re.escape(str(path))}"):
        forge(cache, small, change)


def test_a_chunk_of_another_column_is_refused(cache: Cache, small: Commit) -> None:
    def swap(value: dict[str, Any]) -> None:
        value["arrays"]["token"]["chunks"] = value["arrays"]["topk_id"]["chunks"]

    shard = forge(cache, small, swap)
    with pytest.raises(CorruptError, match=r"token, chunk 0: expected 2048 encoded numbers"):
        shard.read("token")


@pytest.mark.parametrize("edge", sorted(EDGES))
def test_offsets_that_are_none_are_refused(cache: Cache, small: Commit, edge: str) -> None:
    def swap(value: dict[str, Any]) -> None:
        value["arrays"][edge]["chunks"] = value["arrays"]["group"]["chunks"]

    shard = forge(cache, small, swap)
    with pytest.raises(CorruptError, match=rf"{edge}: expected offsets from 0 up to \d+"):
        shard.all_rows()


def test_a_commit_of_another_size_is_refused(cache: Cache, small: Commit) -> None:
    for field in ("rows", "positions", "tokens", "teacher_prompt_tokens"):
        wrong = replace(small, **{field: getattr(small, field) + 1})
        with pytest.raises(CorruptError, match="expected shapes"):
            cache.shard(wrong)


def test_a_commit_of_another_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    other = Cache.create(tmp_path / "other", make_identity(topk=TOPK, temperature=2.0))
    commit = commit_shard(other, random_arrays(0, 20, 2))
    with pytest.raises(MismatchError, match=rf"^commit {make_meta().name}\.0"):
        cache.shard(commit)
