"""A list column of an Arrow table as NumPy arrays: all values end to end, and where rows begin."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Lists:
    """One list a row. A null list has no values; a null value is 0, or NaN among floats."""

    values: np.ndarray
    """(n,)."""
    start: np.ndarray
    """(rows + 1,) int64: first value of each row; the last entry is n."""
    is_null: np.ndarray
    """(rows,) bool: there is no list."""
    value_is_null: np.ndarray
    """(n,) bool."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        return np.diff(self.start)

    def row(self, index: int) -> np.ndarray:
        """Values of one row."""
        return self.values[self.start[index] : self.start[index + 1]]

    def any_in_row(self, chosen: np.ndarray) -> np.ndarray:
        """(rows,) bool: whether one of the row's values is chosen; `chosen` is (n,) bool."""
        return self.count_in_row(chosen) > 0

    def count_in_row(self, chosen: np.ndarray) -> np.ndarray:
        """(rows,) int64: how many of the row's values are chosen; `chosen` is (n,) bool."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        counts: np.ndarray = np.diff(before[self.start])
        return counts


def list_column(column: pa.ChunkedArray) -> Lists:
    """Read a column of lists of numbers; slices and chunks are followed."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    flat = array.flatten()
    filler = float("nan") if pa.types.is_floating(flat.type) else 0
    filled = flat.fill_null(filler) if flat.null_count else flat
    return Lists(
        values=filled.to_numpy(zero_copy_only=False),
        start=edges(lengths),
        is_null=array.is_null().to_numpy(zero_copy_only=False),
        value_is_null=flat.is_null().to_numpy(zero_copy_only=False),
    )


def edges(lengths: np.ndarray) -> np.ndarray:
    """(rows + 1,) int64 offsets of lists with these lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def places(start: np.ndarray, lists: Lists) -> np.ndarray:
    """Where the values of lists go, if row i is laid out from `start[i]` on: (n,) int64."""
    at: np.ndarray = np.arange(len(lists.values))
    at += np.repeat(start - lists.start[:-1], lists.lengths)
    return at
