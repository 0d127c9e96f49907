"""A hash of what a table holds, whatever its chunks, its slices and the library that made it."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from stillroom.cache.foreign_columns import is_list


def content_hash(table: pa.Table) -> str:
    """32 hexadecimal digits of xxh3-128 over names and values, by name. A column without a value is
    as if it were not there; a null list, a null value and an empty list all differ."""
    hasher = xxhash.xxh3_128()
    for name in sorted(table.column_names):
        column = table[name]
        if column.null_count < len(column):
            hasher.update(name.encode() + b"\0")
            _add(hasher, column.combine_chunks())
    return hasher.hexdigest()


def _add(hasher: xxhash.xxh3_128, array: pa.Array) -> None:
    _add_numbers(hasher, array.is_valid().to_numpy(zero_copy_only=False))
    if is_list(array.type):
        _add_numbers(hasher, pc.fill_null(pc.list_value_length(array), 0).to_numpy())
        _add(hasher, array.flatten())
    elif pa.types.is_string(array.type):
        texts = [text.encode() for text in array.fill_null("").to_pylist()]
        _add_numbers(hasher, np.array([len(text) for text in texts], np.int64))
        hasher.update(b"".join(texts))
    else:
        filled = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
        _add_numbers(hasher, filled.to_numpy(zero_copy_only=False))


def _add_numbers(hasher: xxhash.xxh3_128, numbers: np.ndarray) -> None:
    plain = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<"))
    hasher.update(len(plain).to_bytes(8, "little") + plain.tobytes())
