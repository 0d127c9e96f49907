"""Rows of text from a .jsonl, .json, .parquet or .csv file or a dataset of the hub, read with
Hugging Face datasets."""

import json
from collections.abc import Sequence
from typing import Any

from stillroom.cache.errors import InputError, MissingError, first_line
from stillroom.cache.storage import local_path

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_rows(source: str, split: str, limit: int | None) -> Any:
    """Open a dataset; its columns are read when they are asked for.

    Args:
        source: the file, or a hub id.
        split: of a hub id.
        limit: rows to take from the start; None for all.

    Returns:
        A `datasets.Dataset` of one row at least.

    Raises:
        MissingError: the file is not there.
        InputError: it holds no row, or cannot be read.
    """
    import datasets

    path = local_path(source)
    loader = LOADERS.get(path.suffix)
    datasets.disable_progress_bars()
    if loader and not path.is_file():
        raise MissingError(str(path), "a file of rows", "nothing", "Check the source.")
    if loader and path.stat().st_size == 0:
        raise InputError(str(path), "at least one row", "an empty file", "Add rows.")
    try:
        if loader:
            rows = datasets.load_dataset(loader, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        do = "Check the name, the format and the split."
        expected = f"rows as {sorted(LOADERS)} or a hub id"
        raise InputError(source, expected, first_line(error), do) from error
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    if len(rows) == 0:
        raise InputError(source, "at least one row", "none", "Add rows.")
    return rows


def first_column(names: Sequence[str], wanted: Sequence[str], source: str, setting: str) -> str:
    """The first wanted column that is there.

    Raises:
        InputError: none of them is; lists what is.
    """
    for name in wanted:
        if name in names:
            return name
    do = f"Rename the column that holds the text, or set {setting}."
    raise InputError(source, f"a column {' or '.join(wanted)}", f"{sorted(names)}", do)


def parse_messages(value: Any) -> Any:
    """Messages that a CSV file holds as JSON text are parsed; nothing else is changed."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return [value]


def is_message(value: Any) -> bool:
    """Whether it has a role and something said. Templates render what is not there as nothing."""
    if not (isinstance(value, dict) and value.get("role")):
        return False
    return value.get("content") is not None or bool(value.get("tool_calls"))


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and all(map(is_message, value))
