"""Values of a Parquet page as bytes: plain, split into their first bytes, second bytes, ..., or as
codes of one or two bytes into a dictionary."""

import struct
from functools import cache

import numpy as np

from stillroom.cache.parquet_layout import PLAIN, RLE_DICTIONARY, Field
from stillroom.cache.parquet_levels import GROUP
from stillroom.cache.thrift_writer import varint

SIGN = np.uint16(0x8000)
HALF_NAN = np.uint16(0x7C00)
"""Above this, without the sign."""
MANTISSA = 0x3FF
LEAST_NORMAL = np.uint16(113 << 7)
"""Higher 16 bits of the smallest float that is a normal half float."""


def names_dictionary(names: tuple[str, ...]) -> bytes:
    """Names in the order of their codes, as Parquet writes strings."""
    encoded = [name.encode() for name in names]
    return b"".join(struct.pack("<I", len(name)) + name for name in encoded)


def encode_values(field: Field, values: np.ndarray, encoding: int) -> bytes:
    """Bytes of values of a field, as they are in its array, or of codes.

    Args:
        field: whose values they are.
        values: (n,); codes are uint8 for names and uint16 for ids.
        encoding: PLAIN, BYTE_STREAM_SPLIT or RLE_DICTIONARY.
    """
    if encoding == RLE_DICTIONARY:
        padded = np.zeros(-(-len(values) // GROUP) * GROUP, f"<u{values.itemsize}")
        padded[: len(values)] = values
        return _codes_head(len(values), values.itemsize) + padded.tobytes()
    if field.stored == "bool":
        return np.packbits(values.astype(bool), bitorder="little").tobytes()
    wide = half_to_float(values) if field.dtype == "float16" else values
    plain = np.ascontiguousarray(wide, _little(field))
    if encoding == PLAIN:
        return plain.tobytes()
    planes = plain.view(np.uint8).reshape(-1, plain.itemsize)
    return b"".join(np.ascontiguousarray(planes[:, k]).data for k in range(plain.itemsize))


def encoded_bytes(field: Field, count: int, encoding: int) -> int:
    """Length of what `encode_values` makes of so many values."""
    if encoding == RLE_DICTIONARY:
        width = code_bytes(field)
        return len(_codes_head(count, width)) + -(-count // GROUP) * GROUP * width
    if field.stored == "bool":
        return -(-count // 8)
    return count * np.dtype(field.stored).itemsize


def decode_values(
    field: Field, raw: bytes, at: int, count: int, encoding: int, part: slice
) -> np.ndarray:
    """Values in the dtype of the field's array, or codes.

    Args:
        field: whose values they are.
        raw: a page, decompressed.
        at: where the values begin; `encoded_bytes` follow.
        count: of all values.
        encoding: as in `encode_values`.
        part: which of the values to decode.

    Raises:
        ValueError: codes are not one run, or half floats are none.
    """
    if encoding == RLE_DICTIONARY:
        width = code_bytes(field)
        head = _codes_head(count, width)
        if not raw.startswith(head, at):
            raise ValueError("codes that are not one run")
        return np.frombuffer(raw, f"<u{width}", count, at + len(head))[part]
    if field.stored == "bool":
        packed = np.frombuffer(raw, np.uint8, -(-count // 8), at)
        return np.unpackbits(packed, count=count, bitorder="little")[part].astype(field.dtype)
    if encoding == PLAIN:
        return np.frombuffer(raw, _little(field), count, at)[part]
    planes = np.frombuffer(raw, np.uint8, 4 * count, at).reshape(4, count)[:, part]
    if field.dtype == "float16":
        return _merge_halves(planes)
    return _merge(planes).view(_little(field))


def code_bytes(field: Field) -> int:
    """Bytes of a code."""
    return 1 if field.names else 2


def half_to_float(half: np.ndarray) -> np.ndarray:
    """float16 as float32, to the bit: conversion by hardware changes some NaN."""
    with np.errstate(invalid="ignore"):
        out = half.astype(np.float32)
    nan = half.view(np.uint16) & ~SIGN > HALF_NAN
    if nan.any():
        bits = half[nan].view(np.uint16).astype(np.uint32)
        out[nan] = ((bits >> 15 << 31) | np.uint32(0x7F800000) | (bits & MANTISSA) << 13).view(
            np.float32
        )
    return out


def float_to_half(wide: np.ndarray) -> np.ndarray:
    """The inverse of `half_to_float`."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out = wide.astype(np.float16)
    nan = np.isnan(wide)
    if nan.any():
        bits = wide[nan].view(np.uint32)
        half = (bits >> 31 << 15) | np.uint32(HALF_NAN) | (bits >> 13 & MANTISSA)
        out[nan] = half.astype(np.uint16).view(np.float16)
    return out


def _little(field: Field) -> np.dtype:
    return np.dtype(field.stored).newbyteorder("<")


def _codes_head(count: int, width: int) -> bytes:
    """Bits of a code, and the header of one bit-packed run."""
    return bytes([8 * width]) + varint(-(-count // GROUP) << 1 | 1)


def _merge(planes: np.ndarray) -> np.ndarray:
    """(n,) uint32 from (4, n) bytes, lowest first."""
    words = np.empty((planes.shape[1], 2), "<u2")
    words[:, 0] = _word(planes[:2])
    words[:, 1] = _word(planes[2:])
    return words.view("<u4").ravel()


def _merge_halves(planes: np.ndarray) -> np.ndarray:
    """(n,) float16 from the (4, n) bytes of floats that have only half a float's bits.

    The higher 16 bits of a normal number give all of it but its last three bits.
    """
    if planes[0].any() or (planes[1] & 0x1F).any():
        raise ValueError("numbers that are no half floats")
    high = _word(planes[2:])
    half = _first_bits().take(high)
    half |= planes[1] >> 5
    small = np.flatnonzero(high & ~SIGN < LEAST_NORMAL)
    half[small] = float_to_half(_merge(planes[:, small]).view("<f4")).view(np.uint16)
    return half.view(np.float16)


@cache
def _first_bits() -> np.ndarray:
    """(2^16,) uint16: half floats by the higher 16 bits of the float."""
    return float_to_half((np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)).view(
        np.uint16
    )


def _word(planes: np.ndarray) -> np.ndarray:
    """(n,) uint16 from (2, n) bytes, the lower one first."""
    word: np.ndarray = planes[1].astype(np.uint16)
    word <<= 8
    word |= planes[0]
    return word
