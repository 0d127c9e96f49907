"""Readers with bugs, each of another kind, for a test of the fuzzer itself: it must find them."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from stillroom.cache.errors import CorruptError
from tests.fuzz.mutate import mutate_bytes

BYTES = 256 << 20


def _read(bug: Callable[[], object], data: bytes) -> None:
    if b"!" in data:
        bug()


def _error() -> None:
    raise KeyError("x")


def _endless() -> None:
    while True:
        pass


def _hidden() -> None:
    """Memory that runs out, and is taken for damage."""
    try:
        np.ones(BYTES, np.uint8)
    except MemoryError as error:
        raise CorruptError("here", "less", "more", "Restore it.") from error


BUGS: dict[str, Callable[[], object]] = {
    "error": _error,
    "crash": os.abort,
    "memory": partial(bytes, BYTES),
    "hidden memory": _hidden,
    "hang": _endless,
}
KINDS: dict[str, tuple[Any, ...]] = {
    f"planted {name}": (lambda: [b"abc"], partial(_read, bug), mutate_bytes)
    for name, bug in BUGS.items()
}
