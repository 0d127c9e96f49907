"""Canonical JSON: the one way in which Stillroom writes, hashes and reads its small files.

What is read is not trusted: its size, depth, numbers and keys are bounded before anything is made
of it.
"""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any, Never

import numpy as np
import xxhash

from stillroom.cache.errors import CorruptError

MAX_BYTES = 64 << 20
MAX_DEPTH = 32
MAX_CONTAINERS = 1 << 20
"""Arrays and objects of one file: `[],` takes 24 times its bytes once it is parsed."""
SEAL = "xxh3_128"
SEAL_BYTES = len(f',"{SEAL}":""}}') + 32
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def dump(value: Any) -> bytes:
    """Encode with sorted keys and no spaces, so that equal values have equal bytes."""
    return ENCODER.encode(value).encode()


def dump_sealed(value: dict[str, Any]) -> bytes:
    """Encode like `dump`, and end with a field `xxh3_128`: the hash of all bytes before it.

    The name sorts behind those of all other fields, so the result is canonical too.
    """
    body = dump(value)[:-1]
    return body + _seal(body)


def digest(data: bytes) -> str:
    """32 hexadecimal digits of xxh3-128: the hash used for all stored bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def load(data: bytes, where: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8.
        where: named by the error.
        max_bytes: the most that a file of this kind can have.

    Raises:
        CorruptError: the bytes are too many, nest deeper than `MAX_DEPTH`, are not JSON (which has
            no NaN), not an object, or hold a key twice, an integer of more than 64 bits, a number
            beyond float64, or text that is not Unicode.
    """
    if len(data) > max_bytes:
        raise CorruptError(
            where, f"at most {max_bytes} bytes", f"{len(data)} bytes", "Restore the file."
        )
    try:
        _check_nesting(data)
        value = DECODER.decode(data.decode())
        if b"\\" in data:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise CorruptError(where, "a JSON object", str(error), "Restore the file.") from error
    if not isinstance(value, dict):
        raise CorruptError(where, "a JSON object", type(value).__name__, "Restore the file.")
    return value


def load_sealed(data: bytes, where: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Parse what `dump_sealed` wrote, without its hash, which is verified first.

    Raises:
        CorruptError: the bytes are not those that were written, or as in `load`.
    """
    body, found = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    expected = _seal(body)
    if found != expected:
        got = repr(found.decode(errors="replace"))
        raise CorruptError(where, f"an end of {expected.decode()!r}", got, "Restore the file.")
    return load(body + b"}", where, max_bytes)


def build(cls: Any, fields: dict[str, Any], where: str) -> Any:
    """Make a dataclass from parsed JSON whose keys must be exactly its fields.

    Raises:
        CorruptError: a key is missing or unknown, or a value is not of its field's type: a bool is
            no int, and only a float may be given as an int.
    """
    try:
        kinds = _kinds(cls)
        if not isinstance(fields, dict):
            raise TypeError(f"{fields!r:.200}")
        if fields.keys() != kinds.keys():
            wrong = sorted(fields.keys() ^ kinds.keys())
            raise TypeError(f"others: {', '.join(wrong)}")
        for name, kind in kinds.items():
            if not _fits(fields[name], kind):
                raise TypeError(f"{name} = {fields[name]!r:.200}")
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise CorruptError(
            where, f"the fields of {cls.__name__}", str(error), "Restore the file."
        ) from error


def _seal(body: bytes) -> bytes:
    return f',"{SEAL}":"{digest(body)}"}}'.encode()


def _check_nesting(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    brackets = np.frombuffer(STRING.sub(b"", data).translate(None, NOT_BRACKETS), np.uint8)
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    if opens.sum() > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} arrays and objects")
    if np.cumsum(np.where(opens, 1, -1), dtype=np.int32).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels")


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a parsed value is of an annotated type."""
    if kind is float:
        return type(value) is int or type(value) is float
    if kind is Any or type(value) is kind:
        return True
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in args)
    if kind is None or origin is None or type(value) is not origin:
        return False
    if origin is dict:
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is tuple and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(_fits, value, args))
    return all(_fits(item, args[0]) for item in value)


def _integer(text: str) -> int:
    if len(text) <= 20 and -(1 << 63) <= (value := int(text)) < 1 << 64:
        return value
    raise ValueError(f"{text:.30}, which has more than 64 bits")


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.30}, which is beyond float64")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice")
    return value


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant}, which is not JSON")


ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
DECODER = json.JSONDecoder(
    parse_constant=_refuse, parse_int=_integer, parse_float=_real, object_pairs_hook=_unique
)
