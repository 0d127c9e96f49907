"""Writing structs in Thrift's compact protocol, which a Parquet file's own metadata is made of; see
`thrift_reader` for reading them."""

from collections.abc import Sequence
from typing import Any

from stillroom.cache.thrift_reader import BINARY, I32, I64, LIST, STRUCT

Value = tuple[int, Any]
"""A type, and what a field of that type holds."""
Fields = dict[int, Value]
LONG_LIST = 15


def i32(value: int) -> Value:
    """A number of 32 bits."""
    return I32, value


def i64(value: int) -> Value:
    """A number of 64 bits."""
    return I64, value


def text(value: str) -> Value:
    """A string."""
    return BINARY, value.encode()


def struct(fields: Fields) -> Value:
    """A struct inside another."""
    return STRUCT, fields


def list_of(values: Sequence[Value]) -> Value:
    """Values of one type; there is at least one."""
    return LIST, values


def write_struct(fields: Fields) -> bytes:
    """Encode a struct, its fields by number, which are below 16."""
    out = bytearray()
    last = 0
    for number, (kind, value) in sorted(fields.items()):
        out.append((number - last) << 4 | kind)
        out += _write_value(kind, value)
        last = number
    return bytes(out) + b"\0"


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_value(kind: int, value: Any) -> bytes:
    if kind == BINARY:
        return varint(len(value)) + bytes(value)
    if kind == STRUCT:
        return write_struct(value)
    if kind == LIST:
        return _write_list(value)
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _write_list(values: Sequence[Value]) -> bytes:
    kind, count = values[0][0], len(values)
    short = count < LONG_LIST
    head = bytes([(count if short else LONG_LIST) << 4 | kind])
    items = b"".join(_write_value(kind, value) for _, value in values)
    return head + (b"" if short else varint(count)) + items
