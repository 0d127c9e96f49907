"""Where the lists of a Parquet page begin and end: its repetition and definition levels, written
and read as one run each.

An entry of a page is a value, or stands for an empty list. Its repetition level says which list it
continues (0: a new row; 1, in lists of lists: a new inner list), its definition level how much of
the nesting exists (the depth, for a value). Either kind is stored as four bytes of length and one
run of Parquet's RLE hybrid: of equal levels, or of all levels bit-packed.
"""

import struct
from dataclasses import dataclass

import numpy as np

from stillroom.cache.thrift_writer import varint

GROUP = 8
"""Bit-packed runs hold multiples of this."""
PAIRS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint8)
"""The four levels of two bits that a byte holds."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Both kinds of levels of a page, encoded."""

    data: bytes
    entries: int
    """Values and empty lists."""
    values: int


def no_levels(rows: int) -> Levels:
    """Of one value a row, which needs none."""
    return Levels(b"", rows, rows)


def list_levels(length: np.ndarray) -> Levels:
    """Levels of lists with these lengths, one a row."""
    entries = np.maximum(length, 1)
    repetition = np.ones(int(entries.sum()), np.uint8)
    repetition[_starts(entries)] = 0
    data = _pack(repetition, 1) + _pack_each(length > 0, entries, 1)
    return Levels(data, len(repetition), int(length.sum()))


def nested_levels(outer: np.ndarray, inner: np.ndarray) -> Levels:
    """Levels of lists of lists: `outer` inner lists a row, with the lengths `inner`."""
    slots = np.maximum(outer, 1)
    filled = np.repeat(outer > 0, slots)
    length = np.zeros(len(filled), np.int64)
    length[filled] = inner
    entries = np.maximum(length, 1)
    starts = _starts(entries)
    repetition = np.full(int(entries.sum()), 2, np.uint8)
    repetition[starts] = 1
    repetition[starts[_starts(slots)]] = 0
    data = _pack(repetition, 2) + _pack_each(filled.astype(np.uint8) + (length > 0), entries, 2)
    return Levels(data, len(repetition), int(inner.sum()))


def read_list_levels(raw: bytes, entries: int) -> tuple[np.ndarray, int]:
    """Lengths of the lists of a page, and where its levels end.

    Raises:
        ValueError: the levels are not those of lists.
    """
    repetition, at = _unpack(raw, 0, entries, 1)
    definition, at = _unpack(raw, at, entries, 1)
    starts = np.flatnonzero(repetition == 0)
    length = _lengths(starts, entries)
    length[(definition[starts] == 0) & (length == 1)] = 0
    return _checked(list_levels(length), raw, at, length), at


def read_nested_levels(
    raw: bytes, entries: int, outer: np.ndarray, width: int
) -> tuple[np.ndarray, int]:
    """Lengths of the inner lists of a page, and where its levels end.

    Args:
        raw: the page, decompressed.
        entries: values and empty lists in it.
        outer: inner lists of each row.
        width: length of most inner lists.

    Raises:
        ValueError: the levels are not those of lists of lists.
    """
    number = int(outer.sum())
    full = np.full(number, width)
    if number * width == entries and raw.startswith((levels := nested_levels(outer, full)).data):
        return full, len(levels.data)
    repetition, at = _unpack(raw, 0, entries, 2)
    definition, at = _unpack(raw, at, entries, 2)
    starts = np.flatnonzero(repetition < 2)
    kind, length = definition[starts], _lengths(starts, entries)
    length[(kind == 1) & (length == 1)] = 0
    length = length[kind > 0]
    if len(length) != number:
        raise ValueError(f"{len(length)} lists for {number}")
    return _checked(nested_levels(outer, length), raw, at, length), at


def _checked(levels: Levels, raw: bytes, at: int, length: np.ndarray) -> np.ndarray:
    """Lengths, if their levels are those that were read."""
    if levels.data != raw[:at]:
        raise ValueError("levels that fit no lists")
    return length


def _starts(length: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(length) - length
    return starts


def _lengths(starts: np.ndarray, end: int) -> np.ndarray:
    if len(starts) == 0 or starts[0] != 0:
        raise ValueError("a page that begins within a list")
    length: np.ndarray = np.diff(starts, append=end)
    return length


def _pack(levels: np.ndarray, width: int) -> bytes:
    if (levels == levels[0]).all():
        return _equal(int(levels[0]), len(levels))
    groups = -(-len(levels) // GROUP)
    padded = np.zeros(groups * GROUP, np.uint8)
    padded[: len(levels)] = levels
    return _run(varint(groups << 1 | 1) + _pack_bits(padded, width))


def _pack_each(levels: np.ndarray, times: np.ndarray, width: int) -> bytes:
    """Each level so many times."""
    if (levels == levels[0]).all():
        return _equal(int(levels[0]), int(times.sum()))
    return _pack(np.repeat(levels.astype(np.uint8), times), width)


def _equal(level: int, times: int) -> bytes:
    return _run(varint(times << 1) + bytes([level]))


def _run(run: bytes) -> bytes:
    return struct.pack("<I", len(run)) + run


def _pack_bits(levels: np.ndarray, width: int) -> bytes:
    if width == 1:
        return np.packbits(levels, bitorder="little").tobytes()
    four = levels.view("<u4")
    packed: np.ndarray = (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)
    return packed.tobytes()


def _unpack(raw: bytes, at: int, entries: int, width: int) -> tuple[np.ndarray, int]:
    """Levels of one kind, and where they end: the run must be one that `_pack` can write."""
    size = int.from_bytes(raw[at : at + 4], "little")
    run, end = raw[at + 4 : at + 4 + size], at + 4 + size
    groups = -(-entries // GROUP)
    head = varint(entries << 1)
    if len(run) == size == len(head) + 1 and run.startswith(head) and run[-1] < 1 << width:
        return np.full(entries, run[-1], np.uint8), end
    head = varint(groups << 1 | 1)
    if len(run) != size or size != len(head) + groups * width or not run.startswith(head):
        raise ValueError("levels that are not one run")
    packed = np.frombuffer(run, np.uint8, offset=len(head))
    levels = np.unpackbits(packed, bitorder="little") if width == 1 else PAIRS[packed].ravel()
    return levels[:entries], end
