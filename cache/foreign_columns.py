"""Columns of rollouts that another system wrote, cast to a part's types: a value that does not fit
is found with its row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

from stillroom.cache.errors import ShapeError
from stillroom.cache.schema import PART_SCHEMA, USER_PREFIX

TOKEN = "token"
IDS = pa.list_(pa.uint32())
SHOWN = 60
UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)
"""What Arrow and Python raise for a value of another type or size."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a column may hold, and what it becomes."""

    target: pa.DataType
    words: str
    families: tuple[Callable[[pa.DataType], bool], ...]
    depth: int = 0
    """How many lists lie around a value."""

    def fits(self, kind: pa.DataType) -> bool:
        """Whether values of this type may be cast; nulls always may."""
        for _ in range(self.depth):
            if pa.types.is_null(kind):
                return True
            if not is_list(kind):
                return False
            kind = kind.value_type
        return pa.types.is_null(kind) or any(family(kind) for family in self.families)


def is_list(kind: pa.DataType) -> bool:
    """Whether it is a type of lists."""
    types = pa.types
    return any(f(kind) for f in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    types = pa.types
    return any(f(kind) for f in (types.is_string, types.is_large_string, types.is_string_view))


INTEGER, FLOAT, BOOL = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
NUMBER = (INTEGER, FLOAT, BOOL)
LOGPROB = (INTEGER, FLOAT)
TEXT = (_is_text,)
_SPECIAL = {
    "rollout_id": ("an integer from 0, or a string", (INTEGER, _is_text)),
    "group": ("an integer from 0, or a string", (INTEGER, _is_text)),
    "scored": ("a list of 0 and 1", (INTEGER, BOOL)),
    "extra_id": ("a list of token ids for each token", (INTEGER,)),
    "extra_behaviour_logprob": ("a list of numbers for each token", LOGPROB),
}


def _kind(name: str, target: pa.DataType) -> Kind:
    value, depth = target, 0
    while is_list(value):
        value, depth = value.value_type, depth + 1
    if name in _SPECIAL:
        return Kind(target, *_SPECIAL[name], depth)
    if depth:
        is_ids = INTEGER(value)
        words = "a list of token ids" if is_ids else "a list of numbers"
        return Kind(target, words, (INTEGER,) if is_ids else LOGPROB, depth)
    if BOOL(value):
        return Kind(target, "true or false", (BOOL,))
    if _is_text(value):
        return Kind(target, "a string", TEXT)
    return Kind(target, "an integer", (INTEGER,))


KINDS = {f.name: _kind(f.name, f.type) for f in PART_SCHEMA} | {TOKEN: _kind(TOKEN, IDS)}


def kind_of(name: str, values: pa.ChunkedArray | Sequence[Any]) -> Kind | None:
    """What a column may hold; None if it is a user's and has no value to tell from."""
    if not name.startswith(USER_PREFIX):
        return KINDS[name]
    if isinstance(values, pa.ChunkedArray):
        given = None if pa.types.is_null(values.type) else is_list(values.type)
    else:
        first = next((value for value in values if value is not None), None)
        given = None if first is None else hasattr(first, "__len__") and not isinstance(first, str)
    if given is None:
        return None
    if given:
        return Kind(pa.list_(pa.float32()), "a list of numbers", NUMBER, 1)
    return Kind(pa.float32(), "a number", NUMBER)


def cast_column(
    name: str, values: pa.ChunkedArray | Sequence[Any], kind: Kind, where: str
) -> tuple[pa.Array, dict[int, str]]:
    """Cast a column.

    Args:
        name: of the column.
        values: an Arrow column, or one Python value a row.
        kind: what it may hold.
        where: the file or table, for messages.

    Returns:
        The column, null where a value does not fit; and for each of those its row and the reason.

    Raises:
        ShapeError: the type of an Arrow column fits no row.
    """
    if isinstance(values, pa.ChunkedArray) and not kind.fits(values.type):
        do = "Write it with another type, or leave it out."
        raise ShapeError(f"{where}, column {name!r}", kind.words, str(values.type), do)
    try:
        return _cast(values, kind), {}
    except UNFIT:
        return _cast_each(name, values, kind)


def _cast_each(name: str, values: Iterable[Any], kind: Kind) -> tuple[pa.Array, dict[int, str]]:
    bad: dict[int, str] = {}
    out: list[pa.Array] = []
    for row, value in enumerate(values):
        plain = value.as_py() if isinstance(value, pa.Scalar) else value
        try:
            out.append(_cast([plain], kind))
        except UNFIT:
            shown = repr(plain)
            shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
            bad[row] = f"{name!r} is {shown}, {_misfit(plain, kind)}"
            out.append(pa.nulls(1, kind.target))
    return pa.concat_arrays(out), bad


def _misfit(value: Any, kind: Kind) -> str:
    """Why a value cannot be cast: it is of another type, or its type's values go further."""
    target = kind.target
    while is_list(target):
        target = target.value_type
    try:
        fits = kind.fits(pa.array([value]).type)
    except UNFIT:
        fits = isinstance(value, int) and not kind.depth
    if fits and FLOAT(target):
        return "not exact as float32"
    return f"out of {target}" if fits and kind.words == "an integer" else f"not {kind.words}"


def _cast(values: pa.ChunkedArray | Sequence[Any], kind: Kind) -> pa.Array:
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else _array(values, kind)
    if not kind.fits(array.type):
        raise TypeError(str(array.type))
    if pa.types.is_integer(kind.target) and _is_text(array.type):
        hashes = (None if v is None else _hash(v) for v in array.to_pylist())
        return pa.array(hashes, kind.target)
    return array.cast(kind.target)


def _array(values: Sequence[Any], kind: Kind) -> pa.Array:
    """The type is told from the values, or text would become numbers; hashes may be too large for
    that."""
    try:
        return pa.array(values)
    except OverflowError:
        return pa.array(values, kind.target)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
