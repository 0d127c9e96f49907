"""Files of rollouts come in batches, whatever their kind; what is no row keeps its number."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.errors import InputError, MissingError
from stillroom.cache.foreign_rows import Unreadable
from stillroom.tools import rollout_files
from stillroom.tools.layouts import LAYOUTS
from stillroom.tools.rollout_files import read_batches

ROWS = [{"prompt": [i], "completion": [i, 2], "x_a": float(i), "note": "n"} for i in range(5)]


def _parquet() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"prompt": [[1]], "finish_reason": ["text"]})
    pq.write_table(table, sink, compression="none", write_statistics=False, store_schema=False)
    return sink.getvalue()


PARQUET = _parquet()


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows as the kind of file that the name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def read(path: Path, *args: Any) -> tuple[list[Any], list[int]]:
    """All rows of a file, and their numbers."""
    rows: list[Any] = []
    numbers: list[int] = []
    for batch, number in read_batches(path, *args):
        rows += batch.to_pylist() if isinstance(batch, pa.Table) else batch
        numbers += number.tolist()
    return rows, numbers


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_every_kind_gives_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_files, "BATCH_ROWS", 2)
    path = write(tmp_path / name, ROWS)
    assert read(path) == (ROWS, list(range(5)))
    mapped, _ = read(path, {"token": "completion", "x_b": "x_a"})
    assert mapped == [
        {"token": row["completion"], "x_a": row["x_a"], "x_b": row["x_a"]} for row in ROWS
    ]
    with pytest.raises(InputError, match=r"no \['reward'\]"):
        read(path, {"prompt": "prompt", "x_b": "reward"})


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_records_in_another_layout(name: str, tmp_path: Path) -> None:
    outputs = [{"token_ids": [3]}, {"token_ids": [4, 5]}]
    record = {"prompt_token_ids": [1], "outputs": outputs, "x_a": 0.5, "teacher_prompt": [8]}
    rows, numbers = read(write(tmp_path / name, [record, record]), None, LAYOUTS["vllm"])
    assert numbers == [0, 0, 1, 1]
    assert [row["completion"] for row in rows] == [[3], [4, 5]] * 2
    assert all((row["x_a"], row["teacher_prompt"]) == (0.5, [8]) for row in rows)


def test_lines_that_are_no_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\nnonsense\n\n[1]\n{"a": \xff}\n{"prompt_ids": [1]}')
    rows, numbers = read(path)
    assert numbers == [0, 1, 3, 4, 5], "a blank line is no row"
    unreadable = [n for n, row in zip(numbers, rows, strict=True) if isinstance(row, Unreadable)]
    assert unreadable == [1, 4]
    assert rows[1].reason.startswith("no JSON: ")
    rows, _ = read(path, {"prompt": "prompt_ids"})
    assert rows[0] == {}
    assert rows[2] == [1]
    assert rows[4] == {"prompt": [1]}


def test_records_of_another_layout_are_named(tmp_path: Path) -> None:
    records: list[Any] = [{"outputs": [{"token_ids": [3]}]}]
    records += [{"prompt_token_ids": [1], "outputs": 5}, 7]
    rows, _ = read(write(tmp_path / "a.jsonl", records), None, LAYOUTS["vllm"])
    assert rows[0].reason == "another layout: no field 'prompt_token_ids'"
    assert rows[1].reason.startswith("another layout: TypeError")
    assert rows[2] == 7


def test_one_bad_output_leaves_its_siblings(tmp_path: Path) -> None:
    outputs = [{"token_ids": [3]}, {"text": "a"}, {"token_ids": [4]}]
    record = {"prompt_token_ids": [1], "outputs": outputs, "x_a": 0.5}
    rows, numbers = read(write(tmp_path / "a.jsonl", [record]), None, LAYOUTS["vllm"])
    assert numbers == [0, 0, 0]
    assert rows[1] == Unreadable("another layout: no field 'token_ids'")
    assert [(rows[i]["completion"], rows[i]["x_a"]) for i in (0, 2)] == [([3], 0.5), ([4], 0.5)]


def test_of_a_record_only_the_teacher_s_prompt_and_user_columns_are_carried(tmp_path: Path) -> None:
    record = {"prompt_ids": [1], "response_ids": [2], "teacher_prompt_text": "t", "teacher": "t"}
    rows, _ = read(write(tmp_path / "a.jsonl", [record]), None, LAYOUTS["verl"])
    assert set(rows[0]) == {"prompt", "completion", "scored", "behaviour_logprob"}


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.jsonl", None, MissingError, "a file of rollouts"),
        ("a.csv", b"prompt\n", InputError, "a name that ends with"),
        ("a.parquet", b"PAR1 and no more", InputError, "a Parquet file"),
        ("a.jsonl.gz", b'{"prompt": [1]}', InputError, "lines of JSON"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], InputError, "lines of JSON"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, InputError, "lines of JSON"),
        ("a.parquet", PARQUET.replace(b"prompt", b"pro\xff\xfft"), InputError, "a Parquet file"),
        ("a.parquet", PARQUET.replace(b"text", b"t\xff\xfft"), InputError, "a Parquet file"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, data: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        read(tmp_path / name)
