"""Files of rollouts, read in batches of rows: Parquet, and JSON lines, compressed or not."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.errors import InputError, MissingError, first_line
from stillroom.cache.foreign_rows import Rows, Unreadable
from stillroom.cache.schema import USER_PREFIX
from stillroom.tools.layouts import OTHER_RECORD, Layout, not_of_layout

BATCH_ROWS = 1024
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
Batch = tuple[Rows, np.ndarray]


def read_batches(
    path: Path, columns: Mapping[str, str] | None = None, layout: Layout | None = None
) -> Iterator[Batch]:
    """Rows of a file with their numbers, from 0; a line of JSON is a row, or has as many as its
    layout makes of it, or is blank and none.

    Args:
        path: the file.
        columns: a part's column name to the file's; others but `x_...` are left out. None: the
            file has a part's names.
        layout: makes rows of a record; instead of columns.

    Raises:
        MissingError: there is no such file.
        InputError: it is of another kind, cannot be read, or lacks a column that was named.
    """
    if not path.is_file():
        raise MissingError(str(path), "a file of rollouts", "nothing", "Check the path.")
    if not path.name.endswith(SUFFIXES):
        do = "Rename or convert it."
        raise InputError(str(path), f"a name that ends with one of {SUFFIXES}", path.name, do)
    batches = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    if layout is not None:
        return (_laid_out(rows, number, layout) for rows, number in batches)
    return batches if columns is None else _selected(path, batches, columns)


def _parquet(path: Path) -> Iterator[Batch]:
    start = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                batch.validate(full=True)
                yield pa.Table.from_batches([batch]), np.arange(start, start + len(batch))
                start += len(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        do = "Write it again."
        raise InputError(str(path), "a Parquet file", first_line(error), do) from error


def _json_lines(path: Path) -> Iterator[Batch]:
    start = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while lines := list(islice(file, BATCH_ROWS)):
                full = [at for at, line in enumerate(lines) if not line.isspace()]
                yield [_parsed(lines[at]) for at in full], start + np.array(full, np.int64)
                start += len(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            str(path), "lines of JSON", first_line(error), "Write it again."
        ) from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"no JSON: {first_line(error)}")


def _selected(path: Path, batches: Iterator[Batch], columns: Mapping[str, str]) -> Iterator[Batch]:
    """Only the columns that were named, and `x_...`, under a part's names."""
    seen: set[str] = set()
    for rows, number in batches:
        if isinstance(rows, pa.Table):
            seen |= set(rows.column_names)
            taken = {ours: theirs for ours, theirs in columns.items() if theirs in seen}
            taken |= {name: name for name in rows.column_names if name.startswith(USER_PREFIX)}
            yield pa.table({ours: rows[theirs] for ours, theirs in taken.items()}), number
        else:
            yield [_row(row, columns, seen) for row in rows], number
    missing = sorted(set(columns.values()) - seen)
    if missing:
        do = "Name columns that the file has."
        raise InputError(str(path), f"the columns {sorted(columns.values())}", f"no {missing}", do)


def _row(row: Any, columns: Mapping[str, str], seen: set[str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    seen.update(row)
    return _carried(row) | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _carried(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {n: value for n, value in row.items() if n in names or n.startswith(USER_PREFIX)}


def _laid_out(rows: Rows, number: np.ndarray, layout: Layout) -> Batch:
    made: list[Any] = []
    numbers: list[int] = []
    records = rows.to_pylist() if isinstance(rows, pa.Table) else rows
    for row, at in zip(records, number, strict=True):
        found = _converted(row, layout)
        made += found
        numbers += [int(at)] * len(found)
    return made, np.array(numbers, np.int64)


def _converted(row: Any, layout: Layout) -> list[Any]:
    if not isinstance(row, Mapping):
        return [row]
    try:
        made = layout(row)
    except OTHER_RECORD as error:
        return [not_of_layout(error)]
    carried = _carried(row, "teacher_prompt")
    return [one if isinstance(one, Unreadable) else carried | one for one in made]
