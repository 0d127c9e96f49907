"""Canonical JSON: the one way in which Stillroom writes, hashes and reads its small files."""

import dataclasses
import json
from typing import Any, Never

import xxhash

from stillroom.cache.errors import CorruptError

MAX_BYTES = 64 << 20
KINDS: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool}
"""What JSON may hold for a field of that type."""


def dump(value: Any) -> bytes:
    """Encode with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(data: bytes) -> str:
    """32 hexadecimal digits of xxh3-128: the hash used for all stored bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def load(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CorruptError: the bytes are too many, not JSON (which has no NaN), or not an object.
    """
    if len(data) > MAX_BYTES:
        raise CorruptError(
            where, f"at most {MAX_BYTES} bytes", f"{len(data)} bytes", "Restore the file."
        )
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptError(where, "a JSON object", str(error), "Restore the file.") from error
    if not isinstance(value, dict):
        raise CorruptError(where, "a JSON object", type(value).__name__, "Restore the file.")
    return value


def build(cls: type[Any], fields: dict[str, Any], where: str) -> Any:
    """Make a dataclass from parsed JSON whose keys must be exactly its fields.

    Raises:
        CorruptError: a key is missing, unknown, or has an unusable value.
    """
    try:
        made = cls(**fields)
        for field in dataclasses.fields(cls):
            value = getattr(made, field.name)
            if not isinstance(value, KINDS.get(field.type, object)):
                raise TypeError(f"{field.name} = {value!r}")
        return made
    except (TypeError, ValueError) as error:
        raise CorruptError(
            where, f"the fields of {cls.__name__}", str(error), "Restore the file."
        ) from error


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant}, which is not JSON")
