"""How a Parquet shard is laid out: its columns with their types and encodings, and how its
sequences are cut into row groups and pages.

One row a sequence. A column along tokens or positions is a list, one of K or M entries a position a
list of lists; the starts of sequences and the counts of used entries are the lengths of these
lists. Half floats are stored as floats, which every reader knows and which compress better; flags
are booleans; codes of a fixed list of names are these names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from stillroom.cache.lists import edges
from stillroom.cache.schema import (
    COLUMNS,
    FINISH_REASONS,
    SOURCES,
    Axis,
    Column,
    column_of,
)

OBJECT_NAME = "shard.parquet"
MAGIC = b"PAR1"
METADATA_KEY = "stillroom"
"""Of the file's key-value metadata, which holds the attributes."""
GROUP_POSITIONS = 8192
GROUP_ENTRIES = 1 << 20
"""Of teacher entries: with more than 128 a position, groups and pages are shorter."""
GROUP_TOKENS = 1 << 18
"""Of prompts, teacher prompts and completions."""
PAGES = 2
"""Pages that a row group's teacher entries are cut into."""

INT32, INT64, FLOAT, BYTE_ARRAY, BOOLEAN = 1, 2, 4, 6, 0
UTF8, LIST, UINT_32, UINT_64 = 0, 3, 13, 14
PLAIN, RLE, RLE_DICTIONARY, BYTE_STREAM_SPLIT = 0, 3, 8, 9
ROW_AXES: Final[tuple[Axis, ...]] = ("sequence", "token", "teacher_token", "position")
"""The order of columns in the file."""
NAMES: Final = {"finish_reason": FINISH_REASONS, "source": SOURCES}
DERIVED: Final = ("topk_count",)


@dataclass(frozen=True, slots=True)
class Field:
    """One column of the file."""

    name: str
    axis: Axis
    dtype: str
    """Of the array that it becomes."""
    stored: str
    """NumPy's name for the stored values; `names` are strings."""
    width: Literal["", "K", "M"]
    names: tuple[str, ...]
    """What the values 0, 1, ... are called, where they are."""
    is_id: bool
    """Token ids, a list of them a position: coded where possible (see `parquet_id_codes`)."""

    @property
    def depth(self) -> int:
        """Lists around a value: 0, 1 or 2."""
        return 0 if self.axis == "sequence" else 2 if self.width else 1

    @property
    def physical(self) -> int:
        """Parquet's type."""
        return PHYSICAL[self.stored][0]

    @property
    def converted(self) -> int | None:
        """Parquet's annotation of that type."""
        return PHYSICAL[self.stored][1]

    @property
    def path(self) -> list[str]:
        """Names from the root to the values."""
        return [self.name, *["list", "element"] * self.depth]


PHYSICAL: Final[dict[str, tuple[int, int | None]]] = {
    "uint32": (INT32, UINT_32),
    "int32": (INT32, None),
    "uint64": (INT64, UINT_64),
    "float32": (FLOAT, None),
    "bool": (BOOLEAN, None),
    "names": (BYTE_ARRAY, UTF8),
}


def fields_of(user_axes: Mapping[str, Axis], *, extra: bool) -> tuple[Field, ...]:
    """All columns of a file, in their order.

    Args:
        user_axes: axis of each user column.
        extra: whether extra ids were scored.
    """
    columns = [c for c in COLUMNS if extra or c.width != "M"]
    columns += [column_of(name, axis) for name, axis in sorted(user_axes.items())]
    stored = [_field(c) for c in columns if c.axis != "edge" and c.name not in DERIVED]
    return tuple(sorted(stored, key=lambda field: ROW_AXES.index(field.axis)))


def _field(column: Column) -> Field:
    stored = {"float16": "float32", "uint16": "bool"}.get(column.dtype, column.dtype)
    names = NAMES.get(column.name, ())
    return Field(
        column.name,
        column.axis,
        column.dtype,
        "names" if names else stored,
        column.width,
        names,
        is_id=bool(column.width) and column.dtype == "uint32",
    )


def plain_encoding(field: Field) -> int:
    """Encoding of values that are not coded; names always are.

    Raises:
        ValueError: the column has names.
    """
    if field.names:
        raise ValueError("names without a dictionary")
    is_split = field.is_id or field.stored == "float32"
    return BYTE_STREAM_SPLIT if is_split else PLAIN


def group_positions(topk: int) -> int:
    """Positions that a row group holds at most, unless they are of one sequence."""
    return max(1, min(GROUP_POSITIONS, GROUP_ENTRIES // topk))


def row_groups(
    positions: np.ndarray, tokens: np.ndarray, teacher_tokens: np.ndarray, topk: int
) -> list[int]:
    """Sequences in each row group.

    Args:
        positions: (S,) of each sequence, as are the following.
        tokens: of prompt and completion.
        teacher_tokens: of the prompt that only the teacher saw.
        topk: K.
    """
    return cut([(positions, group_positions(topk)), (tokens + teacher_tokens, GROUP_TOKENS)])


def page_rows(field: Field, positions: np.ndarray, topk: int) -> list[int]:
    """Sequences in each page of a column of a row group; `positions` are those of the group's
    sequences. Only lists of lists have more than one."""
    if field.depth < 2:
        return [len(positions)]
    return cut([(positions, max(1, group_positions(topk) // PAGES))])


def cut(limits: Sequence[tuple[np.ndarray, int]]) -> list[int]:
    """Cut rows into runs, each as long as its sums stay within all limits, but of one row at least.

    Args:
        limits: (rows,) sizes of the rows, and the largest sum of a run; at least one such pair.

    Returns:
        Rows in each run.
    """
    sums = [(edges(sizes), limit) for sizes, limit in limits]
    start, rows, runs = 0, len(limits[0][0]), []
    while start < rows:
        ends = [int(np.searchsorted(s, s[start] + limit, "right")) - 1 for s, limit in sums]
        stop = max(min(ends), start + 1)
        runs.append(stop - start)
        start = stop
    return runs
