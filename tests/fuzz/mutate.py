"""Changes of a sample that keep some of its structure, drawn from a random generator."""

import json
import random
from collections.abc import Callable
from typing import Any

from stillroom.cache import jsonfile

MAX_BYTES = 1 << 16
BYTES = (0, 1, 2, 0x7F, 0x80, 0xFF)
ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1", "../x", "0" * 32, [], [1], [[]], {}, {"a": 1}),
    *(-1, 0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.5, -0.0, 1e300, -1e300, 5e-324),
)
Mutation = Callable[[random.Random, bytes], bytes]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change, remove, insert, repeat or cut off a few bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(out) + 1), rng.randint(1, 8)
        choice = rng.randrange(6)
        if choice < 2:
            out[at : at + 1] = bytes([rng.choice(BYTES) if choice else rng.randrange(256)])
        elif choice == 2:
            del out[at : at + size]
        elif choice == 3:
            out[at:at] = rng.randbytes(size)
        elif choice == 4:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + 8 * size]
        elif rng.random() < 0.2:
            del out[at:]
        else:
            out[at : at + size] = bytes([rng.choice(BYTES)]) * size
    return bytes(out[:MAX_BYTES])


def mutate_sealed(rng: random.Random, data: bytes) -> bytes:
    """Change a value of sealed JSON; the seal stays as it was."""
    body = mutate_json(rng, data[: -jsonfile.SEAL_BYTES] + b"}")
    return body[:-1] + data[-jsonfile.SEAL_BYTES :]


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change a value of JSON, or bytes if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    for _ in range(rng.randint(1, 3)):
        value = _changed(rng, value, value)
    changed = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return changed.encode()[:MAX_BYTES]


def mutate_footer(rng: random.Random, data: bytes) -> bytes:
    """Change bytes of a Parquet file's footer; its length stays right, mostly."""
    size = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - size
    if not 0 <= start < len(data) - 8 or rng.random() < 0.2:
        return mutate_bytes(rng, data)
    footer = mutate_bytes(rng, data[start:-8])
    return (data[:start] + footer + len(footer).to_bytes(4, "little") + data[-4:])[:MAX_BYTES]


def _changed(rng: random.Random, value: Any, whole: Any) -> Any:
    """The value with another one somewhere below it."""
    if isinstance(value, list | dict) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = _changed(rng, value[key], whole)
        return copy
    return _other(rng, value, whole)


def _other(rng: random.Random, value: Any, whole: Any) -> Any:
    choice = rng.randrange(6)
    if choice == 0 and type(value) is int:
        return value + rng.choice((-1, 1, 2**31, 2**32))
    if choice == 0 and type(value) is float:
        return value + rng.choice((-1, 1, 0.5, 2**31, 2**32))
    if choice == 1 and isinstance(value, str):
        return mutate_bytes(rng, value.encode(errors="surrogatepass")).decode(errors="replace")
    if choice == 2 and isinstance(value, list):
        return value + value[-1:]
    if choice == 3 and isinstance(value, dict):
        return value | {rng.choice(("x", "x_new", "part")): rng.choice(ODD)}
    if choice == 4:
        return _somewhere(rng, whole)
    return rng.choice(ODD)


def _somewhere(rng: random.Random, value: Any) -> Any:
    """A value from anywhere in it."""
    while isinstance(value, list | dict) and value and rng.random() < 0.8:
        value = rng.choice(list(value.values()) if isinstance(value, dict) else value)
    return value
