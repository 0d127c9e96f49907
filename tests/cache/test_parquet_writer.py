"""Writing a Parquet shard: a file that pyarrow reads as what it is, whatever the arrays."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.errors import ShapeError
from stillroom.cache.example_shards import random_shard
from stillroom.cache.parquet_layout import MAGIC, fields_of
from stillroom.cache.parquet_shard import ParquetFormat
from stillroom.cache.parquet_writer import encode_parquet
from stillroom.cache.schema import EDGE_OF, FINISH_REASONS, SOURCES, Arrays
from stillroom.cache.shard_format import Encoded
from stillroom.cache.testing_shard import expect_same, make_attributes, stored_shard

SETTINGS: dict[str, Any] = {
    "topk": 6,
    "vocab_size": 90,
    "extra": 2,
    "mass": True,
    "user_columns": True,
}
AXES = {"x_reward": "sequence", "x_advantage": "position"}


def encode(arrays: Arrays) -> Encoded:
    """Encode with few attributes."""
    axes = {name: axis for name, axis in AXES.items() if name in arrays}
    return encode_parquet(arrays, {"user_axes": axes, "part": "p"})


def open_file(encoded: Encoded) -> pq.ParquetFile:
    """Open with pyarrow, which compares the checksums of all pages."""
    return pq.ParquetFile(io.BytesIO(encoded.data), page_checksum_verification=True)


def columns_of(file: pq.ParquetFile, topk: int) -> Arrays:
    """A shard's columns from what pyarrow reads, one list after another."""
    table = file.read(use_threads=False)
    found: Arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name == "topk_logprob":
            inner = column.flatten()
            found["topk_count"] = np.diff(inner.offsets.to_numpy()).astype(np.uint16)
        while pa.types.is_list(column.type):
            column = column.flatten()
        found[name] = column.to_numpy(zero_copy_only=False)
    for axis, name in (("token", "token"), ("position", "tail_logprob")):
        lengths = [len(row) for row in table[name].to_pylist()]
        found[EDGE_OF[axis]] = np.cumsum([0, *lengths]).astype(np.uint64)  # type: ignore[index]
    used = np.arange(topk) < found["topk_count"][:, None]
    for name, unused in (("topk_id", 2**32 - 1), ("topk_logprob", -np.inf)):
        full = np.full(used.shape, unused, found[name].dtype)
        full[used] = found[name]
        found[name] = full
    return found


@pytest.mark.parametrize(("positions", "sequences"), [(1, 1), (700, 12), (20_000, 90)])
@pytest.mark.parametrize("teacher_prompts", [False, True])
def test_pyarrow_reads_every_column(
    positions: int, sequences: int, *, teacher_prompts: bool
) -> None:
    arrays = random_shard(1, positions, sequences, teacher_prompts=teacher_prompts, **SETTINGS)
    found = columns_of(open_file(encode(arrays)), 6)
    found["finish_reason"] = np.array([FINISH_REASONS.index(n) for n in found["finish_reason"]])
    found["source"] = np.array([SOURCES.index(name) for name in found["source"]])
    assert found.keys() == arrays.keys() - {"teacher_prompt_start"}
    for name, array in found.items():
        assert array.ravel().astype(arrays[name].dtype).tobytes() == arrays[name].tobytes(), name


def test_types_are_those_that_a_person_expects() -> None:
    file = open_file(encode(random_shard(0, 50, 4, **SETTINGS)))
    found = {field.name: str(field.type).replace(" not null", "") for field in file.schema_arrow}
    numbers = ("uint32", "uint64", "int32", "float", "bool", "string")
    plain = {name for name, kind in found.items() if kind in numbers}
    fields = fields_of(AXES, extra=True)  # type: ignore[arg-type]
    assert plain == {field.name for field in fields if field.axis == "sequence"}
    assert found["finish_reason"] == found["source"] == "string"
    assert found["token"] == "list<element: uint32>"
    assert found["scored"] == "list<element: bool>"
    assert found["topk_id"] == "list<element: list<element: uint32>>"
    assert found["topk_logprob"] == "list<element: list<element: float>>"
    assert not any(field.nullable for field in file.schema_arrow)


def test_attributes_are_in_the_metadata() -> None:
    file = open_file(encode(random_shard(0, 50, 4, **SETTINGS)))
    assert json.loads(file.metadata.metadata[b"stillroom"]) == {"user_axes": AXES, "part": "p"}


def test_the_footer_says_where_the_manifest_has_the_chunks() -> None:
    encoded = encode(random_shard(0, 20_000, 90, **SETTINGS))
    metadata = open_file(encoded).metadata
    assert metadata.num_row_groups == len(encoded.row_groups) == 3
    for number, rows in enumerate(encoded.row_groups):
        group = metadata.row_group(number)
        assert group.num_rows == rows
        for i in range(group.num_columns):
            column = group.column(i)
            chunk = encoded.arrays[column.path_in_schema.split(".")[0]].chunks[number]
            start = column.dictionary_page_offset or column.data_page_offset
            assert (start, column.total_compressed_size) == (chunk.offset, chunk.length)
    ends = [c.offset + c.length for entry in encoded.arrays.values() for c in entry.chunks]
    starts = [c.offset for entry in encoded.arrays.values() for c in entry.chunks]
    assert sorted([len(MAGIC), *ends])[:-1] == sorted(starts)


def test_metadata_is_less_than_a_byte_a_position() -> None:
    arrays = random_shard(0, 50_000, 100, topk=2, vocab_size=50)
    stored = stored_shard(ParquetFormat(), arrays, topk=2, vocab_size=50)
    pages = sum(c.length for entry in stored.encoded.arrays.values() for c in entry.chunks)
    footer = len(stored.encoded.data) - pages
    assert footer + len(stored.source.manifest.to_json()) < 50_000


@pytest.mark.parametrize(
    ("largest", "has_codes"), [(2**24 - 1, True), (2**24, False), (2**32 - 2, False)]
)
def test_ids_that_have_no_codes_stand_for_themselves(largest: int, *, has_codes: bool) -> None:
    arrays = random_shard(0, 50, 4, topk=3, vocab_size=50)
    arrays["topk_id"][7, 0] = largest
    stored = stored_shard(ParquetFormat(), arrays, topk=3, vocab_size=2**32 - 1)
    expect_same(stored.read_all(), arrays, f"{largest}")
    file = open_file(stored.encoded)
    names = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    column = file.metadata.row_group(0).column(names.index("topk_id.list.element.list.element"))
    assert column.has_dictionary_page == has_codes
    assert columns_of(file, 3)["topk_id"].tolist() == arrays["topk_id"].tolist()


def test_more_ids_than_codes_stand_for_themselves() -> None:
    arrays = random_shard(0, 1100, 4, topk=60, vocab_size=60)
    arrays["topk_id"] = np.arange(66_000, dtype=np.uint32).reshape(1100, 60)
    stored = stored_shard(ParquetFormat(), arrays, topk=60, vocab_size=70_000)
    expect_same(stored.read_all(), arrays, "66,000 ids")
    assert columns_of(open_file(stored.encoded), 60)["topk_id"].ravel().tolist() == [*range(66_000)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("scored", 2), ("ends_with_stop", 2), ("finish_reason", 4), ("source", 5), ("source", 256)],
)
def test_numbers_that_have_no_name_are_refused(name: str, value: int) -> None:
    arrays = random_shard(0, 50, 4, **SETTINGS)
    arrays[name][1] = value
    with pytest.raises(ShapeError, match=rf"^column '{name}': expected numbers below"):
        encode(arrays)


def test_attributes_change_nothing_but_the_footer() -> None:
    arrays = random_shard(0, 50, 4, topk=3, vocab_size=50)
    identity = stored_shard(ParquetFormat(), arrays, topk=3, vocab_size=50).source.identity
    first, second = encode(arrays), encode_parquet(arrays, make_attributes(arrays, identity))
    assert first.arrays == second.arrays
    assert first.data != second.data
