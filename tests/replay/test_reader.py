"""Blocks of rows: whatever the block and the part, the very values of the shard."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import MissingError, ShapeError
from stillroom.cache.example_shards import USER_AXES, random_shard
from stillroom.cache.schema import Arrays
from stillroom.cache.store import Cache
from stillroom.replay.batch import Facts, Row, collate
from stillroom.replay.reader import COLUMNS, OF_FACTS, RowReader, _cut, _facts
from tests.cache.fakes import SCORED_BY, make_identity, make_meta
from tests.replay.collate_twin import assert_collated

PARTS: tuple[tuple[int, int, float | None], ...] = (
    (60, 5, 1.0),
    (9, 1, None),
    (7, 7, 0.5),
    (400, 23, 0.0),
)
"""Positions, rows and temperature; in the third each row has one position."""
ROWS = sum(rows for _, rows, _ in PARTS)
EXTRA = 2
LONGEST = 10**6


def make_cache(root: Path, **identity: Any) -> Cache:
    """A cache of those parts, with gaps in what is scored, unused entries and user columns."""
    cache = Cache.create(root, make_identity(**identity))
    extra = cache.identity.extra
    for number, (positions, rows, temperature) in enumerate(PARTS):
        arrays = random_shard(
            number,
            positions,
            rows,
            topk=cache.identity.topk,
            vocab_size=cache.identity.vocab_size,
            extra=extra,
            mass=cache.identity.mass < 1,
            user_columns=True,
        )
        meta = make_meta(number, sampler={"temperature": temperature} if number != 1 else {})
        assert cache.add_shard(meta, "0" * 32, arrays, SCORED_BY) is not None
    return cache


@pytest.fixture(scope="module", params=["zarr", "parquet"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The parts, with extra ids, in each format."""
    root = tmp_path_factory.mktemp("read") / "cache"
    more = {"extra": EXTRA, "extra_kind": "student", "mass": 0.9}
    return make_cache(root, shard_format=request.param, **more)


@pytest.fixture(scope="module")
def stored(cache: Cache) -> list[Arrays]:
    """Every row, out of whole shards."""
    return list(rows_of(cache))


def rows_of(cache: Cache) -> Iterator[Arrays]:
    """Every row of a cache in snapshot order, cut by hand out of whole shards."""
    for commit in cache.snapshot().commits:
        arrays = cache.shard(commit).all_rows()
        edges = {
            "token": arrays["sequence_start"].astype(int),
            "position": arrays["position_start"].astype(int),
            "sequence": np.arange(commit.rows + 1),
        }
        for row in range(commit.rows):
            yield {
                name: arrays[name][edges[axis][row] : edges[axis][row + 1]]
                for name, axis in COLUMNS.items()
                if name in arrays
            }


def cut_by_hand(row: Arrays, max_tokens: int) -> Arrays:
    """A row's first tokens and their positions."""
    kept = int(np.count_nonzero(row["scored"][:max_tokens]))
    ends = {"token": max_tokens, "position": kept, "sequence": 1}
    return {name: array[: ends[COLUMNS[name]]] for name, array in row.items()}


def assert_row(found: Row, expected: Arrays) -> None:
    """All that is expected, as columns or as facts."""
    assert_equal(found.arrays, {n: a for n, a in expected.items() if n not in OF_FACTS})
    assert found.facts is not None
    assert found.facts.target.tolist() == np.flatnonzero(expected["scored"]).tolist()
    assert [found.facts.source] == expected["source"].tolist()
    assert [found.facts.policy_version] == expected["policy_version_min"].tolist()


def open_reader(cache: Cache, block_rows: int, max_tokens: int = LONGEST) -> RowReader:
    """A reader of all of a cache."""
    return RowReader(cache, cache.snapshot(), block_rows, 3, max_tokens)


def open_weighted(cache: Cache, name: str, max_tokens: int = LONGEST) -> RowReader:
    """A reader of all of a cache and of a user column as weights."""
    return RowReader(cache, cache.snapshot(), 4, 3, max_tokens, weight_column=name)


def assert_equal(found: Arrays, expected: Arrays) -> None:
    """Equal to the bit, dtypes too."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("block_rows", [1, 2, 3, 5, 6, 7, 16, ROWS - 1, ROWS, ROWS + 5])
def test_rows_are_those_of_whole_shards_whatever_the_block(
    cache: Cache, stored: list[Arrays], block_rows: int
) -> None:
    reader = open_reader(cache, block_rows)
    blocks = {number: reader.read(number) for number in range(-(-ROWS // block_rows))}
    for number, expected in enumerate(stored):
        row = reader.row(blocks[reader.block_of(number)], number)
        assert_row(row, expected)
        assert (row.number, row.cache) == (number, 3)


def test_a_block_has_a_piece_of_each_part_that_it_lies_in(cache: Cache) -> None:
    firsts = [piece.first for piece in open_reader(cache, ROWS).read(0)]
    assert firsts == [0, 5, 6, 13]
    reader = open_reader(cache, 4)
    assert [[piece.first for piece in reader.read(b)] for b in range(4)] == [
        [0],
        [4, 5, 6],
        [8],
        [12, 13],
    ]


@pytest.mark.parametrize(
    ("sampler", "likeliest"),
    [({"extra": 2}, True), ({"extra": 2, "extra_drawn": True}, False), ({}, False)],
)
def test_rows_keep_what_the_sampler_noted_beside_them(
    tmp_path: Path, sampler: dict[str, Any], likeliest: bool
) -> None:
    cache = Cache.create(tmp_path, make_identity(extra=EXTRA, extra_kind="student"))
    vocab, topk = cache.identity.vocab_size, cache.identity.topk
    arrays = random_shard(0, 9, 3, topk=topk, vocab_size=vocab, extra=EXTRA)
    cache.add_shard(make_meta(0, sampler=sampler), "0" * 32, arrays, SCORED_BY)
    reader = open_reader(cache, 2)
    rows = [reader.row(reader.read(reader.block_of(number)), number) for number in range(3)]
    assert [row.extra_likeliest for row in rows] == [likeliest] * 3
    assert collate(rows).extra_likeliest.tolist() == [likeliest] * 9


def test_rows_keep_the_temperature_of_their_part(cache: Cache) -> None:
    reader = open_reader(cache, ROWS)
    block = reader.read(0)
    found = [reader.row(block, number).sampling_temperature for number in range(ROWS)]
    assert found[:5] == [1.0] * 5
    assert math.isnan(found[5])
    assert found[6:13] == [0.5] * 7
    assert found[13:] == [0.0] * 23


def test_only_what_a_batch_needs_is_read(cache: Cache) -> None:
    """Above all no user column, which has as many entries as rows or as positions."""
    for piece in open_reader(cache, 3).read(0):
        assert set(piece.arrays) == {*COLUMNS, "sequence_start", "position_start"}


@pytest.mark.parametrize("name", USER_AXES)
def test_a_user_column_becomes_weights(cache: Cache, name: str) -> None:
    """Of a row or of its positions, also where it is cut."""
    whole = [cache.shard(commit).all_rows()[name] for commit in cache.snapshot().commits]
    for max_tokens in (LONGEST, 5):
        reader = open_weighted(cache, name, max_tokens)
        plain = open_reader(cache, 4, max_tokens)
        rows = [reader.row(reader.read(reader.block_of(n)), n) for n in range(ROWS)]
        for number, row in enumerate(rows):
            weight = row.arrays.pop("weight")
            positions = len(row.arrays["sampled_logprob"])
            assert len(weight) == (
                min(1, positions) if USER_AXES[name] == "sequence" else positions
            )
            block = plain.read(plain.block_of(number))
            assert_equal(row.arrays, plain.row(block, number).arrays)
        if max_tokens == LONGEST:
            again = [reader.row(reader.read(reader.block_of(n)), n) for n in range(ROWS)]
            found = np.concatenate([row.arrays["weight"] for row in again])
            assert found.tobytes() == np.concatenate(whole).tobytes()


def test_weights_that_a_shard_does_not_have_are_missed(cache: Cache) -> None:
    with pytest.raises(MissingError, match=r"'x_none'; got none.*x_"):
        open_weighted(cache, "x_none").read(0)


def test_a_block_is_as_large_as_it_says(cache: Cache) -> None:
    long = [name for name, axis in COLUMNS.items() if axis != "sequence"]
    for block_rows in (1, 7, ROWS):
        reader = open_reader(cache, block_rows)
        for number in range(-(-ROWS // block_rows)):
            pieces = reader.read(number)
            held = sum(p.arrays[name].nbytes for p in pieces for name in long)
            held += sum(facts.target.nbytes for p in pieces for facts in p.facts)
            assert reader.block_bytes(number) == held


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 13, 40])
def test_a_long_row_keeps_its_first_tokens_and_their_positions(
    cache: Cache, stored: list[Arrays], max_tokens: int
) -> None:
    reader = open_reader(cache, ROWS, max_tokens)
    block = reader.read(0)
    cut = 0
    for number, whole in enumerate(stored):
        expected = cut_by_hand(whole, max_tokens)
        assert_row(reader.row(block, number), expected)
        cut += len(expected["tail_logprob"]) < len(whole["tail_logprob"])
    assert cut > 0


def test_a_cut_counts_tokens_that_are_not_scored() -> None:
    row: Arrays = {
        "token": np.arange(7, dtype=np.uint32),
        "prompt_length": np.array([2], np.uint32),
        "sampled_logprob": np.array([-1, -2, -3], np.float32),
        "extra_id": np.arange(6, dtype=np.uint32).reshape(3, 2),
    }
    positions = {7: 3, 6: 2, 5: 1, 4: 1, 3: 1, 2: 0}
    for max_tokens, kept in positions.items():
        found, facts = _cut(row, Facts(np.array([2, 5, 6], np.int32), 1, 4), max_tokens)
        assert facts.target.tolist() == [2, 5, 6][:kept]
        assert (facts.source, facts.policy_version) == (1, 4)
        assert found["token"].tolist() == list(range(max_tokens))
        assert found["sampled_logprob"].tolist() == [-1, -2, -3][:kept]
        assert found["extra_id"].shape == (kept, 2)
        assert found["prompt_length"].tolist() == [2]


def test_a_row_with_more_or_fewer_positions_than_are_scored_is_refused() -> None:
    arrays: Arrays = {
        "scored": np.array([0, 1, 1, 0, 1, 0, 0, 1], np.uint16),
        "sequence_start": np.array([0, 3, 5, 8]),
        "position_start": np.array([0, 2, 3, 4]),
        "source": np.array([1, 2, 3], np.uint16),
        "policy_version_min": np.array([7, 8, -1], np.int32),
    }
    found = [(f.target.tolist(), f.source, f.policy_version) for f in _facts(arrays, 40)]
    assert found == [([1, 2], 1, 7), ([1], 2, 8), ([2], 3, -1)]
    for start, got in ([0, 2, 4, 4], 2), ([0, 2, 2, 4], 0):
        message = rf"^row 41, tail_logprob: expected 1 positions, as are scored; got {got}\."
        with pytest.raises(ShapeError, match=message):
            _facts(arrays | {"position_start": np.array(start)}, 40)


@pytest.mark.parametrize("max_tokens", [LONGEST, 7])
@pytest.mark.parametrize("weight", [None, *USER_AXES])
def test_rows_of_several_caches_are_collated_as_a_plain_twin_does(
    cache: Cache, tmp_path: Path, max_tokens: int, weight: str | None
) -> None:
    """Of other K and M, in any order, against rows cut by hand out of whole shards."""
    narrow = make_cache(tmp_path / "narrow", topk=cache.identity.topk - 1)
    rows, plain = [], []
    for source, own in (cache, weight), (narrow, None):
        reader = RowReader(source, source.snapshot(), 4, 3, max_tokens, weight_column=own)
        for number, whole in enumerate(rows_of(source)):
            row = reader.row(reader.read(reader.block_of(number)), number)
            arrays = cut_by_hand(whole, max_tokens)
            if own is not None:
                arrays["weight"] = row.arrays["weight"] = abs(row.arrays["weight"])
            rows.append(row)
            plain.append(replace(row, arrays=arrays, facts=None))
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    for chosen in (order, order[:9], order[-1:], range(ROWS)):
        assert_collated([rows[i] for i in chosen], [plain[i] for i in chosen], None)


@pytest.mark.parametrize("extra", [0, EXTRA])
def test_rows_are_what_a_batch_is_made_of(tmp_path: Path, extra: int) -> None:
    kind = {"extra": extra, "extra_kind": "student" if extra else "none"}
    reader = open_reader(make_cache(tmp_path / "cache", **kind), ROWS)
    block = reader.read(0)
    rows = [reader.row(block, number) for number in (12, 4, 30)]
    batch = collate(rows)
    assert batch.extra_id.shape == (batch.num_positions, extra)
    assert [len(row.arrays["token"]) for row in rows] == np.diff(batch.row_start).tolist()


def test_a_part_that_comes_back_is_read(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    reader = open_reader(cache, 4)
    manifests = sorted((tmp_path / "cache").glob("scores/*/*/manifest.json"))
    kept = [(path, path.read_bytes()) for path in manifests]
    for path in manifests:
        path.unlink()
    with pytest.raises(MissingError, match=r"manifest\.json"):
        reader.read(0)
    for path, data in kept:
        path.write_bytes(data)
    firsts = [piece.first for number in range(-(-ROWS // 4)) for piece in reader.read(number)]
    assert all(one < other for one, other in pairwise(firsts))
