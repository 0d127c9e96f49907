"""Reading structs in Thrift's compact protocol, which Parquet's metadata is made of: they become
dicts by field number.

Nothing that the bytes say makes it take more memory than a fixed multiple of their number.
"""

import struct
from typing import Any

MAX_DEPTH = 16
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


def read_struct(data: bytes, at: int = 0, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Fields of the struct that begins at a byte, and the byte after it.

    Integers are int, text and binaries bytes, lists and sets list.

    Raises:
        ValueError: the bytes end early, nest too deep, or are of a type that Parquet has not.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels of structs")
    found: dict[int, Any] = {}
    number = 0
    while byte := _byte(data, at):
        step, kind = divmod(byte, 16)
        at += 1
        if step == 0:
            step, at = _read_integer(data, at)
            number = 0
        number += step
        if kind in (TRUE, FALSE):
            found[number] = kind == TRUE
        else:
            found[number], at = _read_value(data, at, kind, depth)
    return found, at + 1


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE, BYTE):  # a bool is a byte in a list only
        return _byte(data, at), at + 1
    if kind in (I16, I32, I64):
        return _read_integer(data, at)
    if kind == DOUBLE:
        return struct.unpack("<d", _slice(data, at, 8))[0], at + 8
    if kind == BINARY:
        size, at = _read_varint(data, at)
        return _slice(data, at, size), at + size
    if kind in (LIST, SET):
        return _read_list(data, at, depth)
    if kind == STRUCT:
        return read_struct(data, at, depth + 1)
    raise ValueError(f"a value of type {kind}")


def _read_list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels of lists")
    size, kind = divmod(_byte(data, at), 16)
    at += 1
    if size == 15:
        size, at = _read_varint(data, at)
    found = []
    for _ in range(size):  # each takes a byte at least, so a false size ends with the bytes
        value, at = _read_value(data, at, kind, depth + 1)
        found.append(value)
    return found, at


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = _byte(data, at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _slice(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise ValueError("a value that is cut off")
    return data[at : at + size]


def _byte(data: bytes, at: int) -> int:
    if at >= len(data):
        raise ValueError("a struct that is cut off")
    return data[at]
