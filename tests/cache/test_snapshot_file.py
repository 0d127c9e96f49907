"""The file of a snapshot gives back its commits or is refused, whoever wrote it."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import jsonfile, snapshot_file
from stillroom.cache.commits import Commit, encode_row_table
from stillroom.cache.errors import CorruptError
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, seal
from stillroom.cache.part import part_name
from stillroom.cache.snapshot_file import SCHEMA, decode_commits, encode_commits
from tests.cache.conftest import QUICK


def make_commit(number: int, rows: int = 3) -> Commit:
    """A commit with random contents."""
    rng = np.random.default_rng(number)
    prompt, positions, others = rng.integers(1, 300, (3, rows))
    tokens = prompt + positions + others
    return Commit(
        part=part_name(number // 8, f"{number:016x}"),
        n=number % 3,
        attempt=rng.bytes(16).hex(),
        identity="1" * 32,
        manifest_hash=rng.bytes(16).hex(),
        rollouts_hash=rng.bytes(16).hex(),
        rows=rows,
        positions=int(positions.sum()),
        tokens=int(tokens.sum()),
        teacher_prompt_tokens=0,
        stored_bytes=1000,
        teacher_s=2.5,
        scorer={"host": "h", "pid": number},
        row_table=encode_row_table(tokens, prompt, positions),
    )


COMMITS = tuple(make_commit(number) for number in range(20))
DATA = encode_commits(COMMITS)


def columns(commits: tuple[Commit, ...] = COMMITS[:3]) -> dict[str, list[Any]]:
    """What the file of these commits holds."""
    table = pq.ParquetFile(io.BytesIO(encode_commits(commits))).read()
    return {name: table[name].to_pylist() for name in SCHEMA.names}


def written(values: dict[str, list[Any]], schema: pa.Schema = SCHEMA, **options: Any) -> bytes:
    """A file of any values, as a hostile writer makes it: with right checksums and hashes."""
    sink = io.BytesIO()
    plain = {"use_dictionary": False, "write_statistics": False, "compression": "zstd"}
    table = pa.table(values, schema)
    with pq.ParquetWriter(sink, schema, **plain | options) as writer:
        writer.add_key_value_metadata({HASH_KEY: NO_HASH})
        writer.write_table(table)
    return seal(sink.getvalue())


@QUICK
@given(st.sets(st.integers(0, 19)), st.integers(1, 5))
def test_any_commits_come_back(chosen: set[int], group_rows: int) -> None:
    commits = tuple(COMMITS[i] for i in sorted(chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_file, "GROUP_ROWS", group_rows)
        data = encode_commits(commits)
    assert pq.ParquetFile(io.BytesIO(data)).metadata.num_row_groups == -(-len(chosen) // group_rows)
    assert decode_commits(data, "here") == commits


def test_large_commits_make_small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [len(commit.to_json()) for commit in COMMITS]
    monkeypatch.setattr(snapshot_file, "GROUP_BYTES", 2 * max(sizes))
    data = encode_commits(COMMITS)
    meta = pq.ParquetFile(io.BytesIO(data)).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [2] * 10
    assert decode_commits(data, "here") == COMMITS
    monkeypatch.setattr(snapshot_file, "GROUP_BYTES", 1)
    assert decode_commits(encode_commits(COMMITS), "here") == COMMITS


def test_the_bytes_that_pages_become_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_commits(COMMITS)
    meta = pq.ParquetFile(io.BytesIO(data)).metadata
    raw = sum(len(c.part) + len(c.to_json()) + snapshot_file.FIXED_BYTES for c in COMMITS)
    headers = sum(meta.row_group(0).column(i).total_uncompressed_size for i in range(7)) - raw
    assert 0 < headers < 7 * 60
    monkeypatch.setattr(snapshot_file, "_raw_limit", lambda _: raw)
    assert decode_commits(encode_commits(COMMITS), "here") == COMMITS
    monkeypatch.setattr(snapshot_file, "_raw_limit", lambda _: raw - 1)
    with pytest.raises(CorruptError, match="claim to become far more"):
        decode_commits(data, "here")


def test_it_is_a_table_for_others() -> None:
    assert columns() == {
        "part": [c.part for c in COMMITS[:3]],
        "n": [0, 1, 2],
        "commit_hash": [c.digest() for c in COMMITS[:3]],
        "rows": [3, 3, 3],
        "positions": [c.positions for c in COMMITS[:3]],
        "weight": [1.0, 1.0, 1.0],
        "commit": [c.to_json() for c in COMMITS[:3]],
    }
    assert decode_commits(written(columns()), "here") == COMMITS[:3]


@settings(QUICK, max_examples=400)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused(at: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[at] ^= change
    with pytest.raises(CorruptError, match=r"^here"):
        decode_commits(bytes(damaged), "here")


@pytest.mark.parametrize("length", [0, 4, 7, 8, 12, len(DATA) // 2, len(DATA) - 1])
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(CorruptError, match=r"^here"):
        decode_commits(DATA[:length], "here")


def swapped(column: str) -> dict[str, list[Any]]:
    values = columns()
    values[column] = values[column][::-1]
    return values


@pytest.mark.parametrize("column", ["part", "n", "commit_hash", "positions", "commit"])
def test_columns_of_other_rows_are_refused(column: str) -> None:
    with pytest.raises(CorruptError, match=r"^here"):
        decode_commits(written(swapped(column)), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"weight": [1.0, 2.0, 1.0]},
        {"weight": [1.0, float("nan"), 1.0]},
        {"rows": [3, 3, -3]},
        {"n": [0, 1, 5]},
        {"part": ["../../x", "b", "c"]},
        {"commit_hash": ["0" * 32] * 3},
        {"commit": [b"", b"", b""]},
    ],
    ids=str,
)
def test_columns_that_say_something_else_are_refused(change: dict[str, list[Any]]) -> None:
    with pytest.raises(CorruptError, match=r"^here"):
        decode_commits(written(columns() | change), "here")


def test_a_part_twice_or_out_of_order_is_refused() -> None:
    for commits in ((COMMITS[1], COMMITS[0]), (COMMITS[0], replace(COMMITS[0], n=1))):
        with pytest.raises(CorruptError, match=f"{commits[1].part} after {commits[0].part}"):
            decode_commits(encode_commits(commits), "here")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"n":1', "the fields of Commit"),
        (b'{"n":' + b"[" * 5000 + b"]" * 5000, "more than 32 levels"),
        (b'{"n":1,"n":2', "a key twice"),
        (b'{"n":' + b"9" * 5000, "more than 64 bits"),
        (b'{"n":NaN', "not JSON"),
    ],
    ids=["fields", "deep", "twice", "huge", "nan"],
)
def test_an_embedded_bomb_is_refused(body: bytes, problem: str) -> None:
    blob = body + f',"xxh3_128":"{jsonfile.digest(body)}"}}'.encode()
    change: dict[str, list[Any]] = {"commit": [blob] * 3}
    change["commit_hash"] = [jsonfile.digest(blob)] * 3
    where = rf"^here, commits/v000000/{COMMITS[0].part}\.0\.json: "
    with pytest.raises(CorruptError, match=f"{where}.*{problem}"):
        decode_commits(written(columns() | change), "here")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"compression": "gzip"},
        {"compression": "snappy"},
        {"data_page_version": "2.0"},
        {"column_encoding": {"rows": "DELTA_BINARY_PACKED"}},
        {"column_encoding": {"commit": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=str,
)
def test_other_encodings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"^here: expected a snapshot"):
        decode_commits(written(columns(), **options), "here")


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema(list(SCHEMA)[:-1]),
        pa.schema([*SCHEMA, pa.field("more", pa.int8(), nullable=False)]),
        SCHEMA.set(0, pa.field("part", pa.string(), nullable=True)),
        SCHEMA.set(1, pa.field("n", pa.int64(), nullable=False)),
        SCHEMA.set(5, pa.field("weight", pa.float64(), nullable=False)),
        SCHEMA.set(6, pa.field("commit", pa.list_(pa.int32()), nullable=False)),
        pa.schema(list(SCHEMA)[::-1]),
    ],
    ids=["fewer", "more", "nullable", "int64", "float64", "list", "order"],
)
def test_other_columns_are_refused(schema: pa.Schema) -> None:
    values = {"more": [1, 2, 3], **columns()}
    values = {name: values[name] for name in schema.names}
    with pytest.raises(CorruptError, match=r"expected a snapshot; got columns"):
        decode_commits(written(values, schema), "here")


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_file, "SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(snapshot_file, "INFLATION", 4)
    data = written(columns() | {"commit": [b"\0" * 600_000] * 3})
    assert len(data) < 9000
    with pytest.raises(CorruptError, match="pages that claim to become far more than the file"):
        decode_commits(data, "here")


def test_what_compresses_too_well_is_stored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = tuple(replace(c, scorer={"log": "a" * 100_000}) for c in COMMITS)
    packed = encode_commits(commits)
    assert len(packed) < 100_000
    monkeypatch.setattr(snapshot_file, "SMALL_BYTES", 1 << 20)
    with pytest.raises(CorruptError, match="claim to become far more"):
        decode_commits(packed, "here")
    assert decode_commits(encode_commits(commits), "here") == commits
