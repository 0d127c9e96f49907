"""Which rows a reader wants, as plain settings, and how they are held against a shard's columns."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError
from stillroom.cache.schema import COLUMNS, FINISH_REASONS, SOURCES, USER_NAME

RANGED = tuple(c.name for c in COLUMNS if c.axis == "sequence" and c.unit != "code")
"""A shard's own columns that `RowFilter.ranges` may name."""
PAIRS = tuple((f"min_{what}", f"max_{what}") for what in ("policy_version", "tokens", "positions"))
CODES = {"finish_reasons": FINISH_REASONS, "sources": SOURCES}
IDS = ("prompt_ids", "exclude_prompt_ids", "exclude_rollouts")
COLUMN_OF = {
    "min_policy_version": "policy_version_min",
    "max_policy_version": "policy_version_max",
    "max_lag": "policy_version_min",
    "finish_reasons": "finish_reason",
    "sources": "source",
    "prompt_ids": "prompt_id",
    "exclude_prompt_ids": "prompt_id",
    "exclude_rollouts": "rollout_id",
}
"""What is read from a shard for a setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFilter:
    """Conditions that a row must meet, all of them. What is not given keeps every row.

    Raises:
        ConfigError: a value is out of range, contradicts another, or is no known name.
    """

    min_policy_version: int | None = None
    """No policy before this one sampled any of the row; >= 0. A row of an unknown policy fits
    neither this nor max_policy_version nor max_lag."""
    max_policy_version: int | None = None
    """No policy after this one sampled any of the row; >= 0."""
    max_lag: int | None = None
    """Versions that the oldest policy of a row may be behind the newest such policy of the
    snapshot; >= 0."""
    finish_reasons: tuple[str, ...] = ()
    """How the rollout may have ended: unknown, stop, length, abort."""
    sources: tuple[str, ...] = ()
    """Who may have written the completion: unknown, student, teacher, dataset, import."""
    min_tokens: int | None = None
    """Fewest tokens of prompt and completion, as stored; >= 0."""
    max_tokens: int | None = None
    """Most tokens of prompt and completion, as stored; >= 0."""
    min_positions: int | None = None
    """Fewest scored tokens, as stored; >= 0."""
    max_positions: int | None = None
    """Most scored tokens, as stored; >= 0."""
    prompt_ids: tuple[int, ...] = ()
    """Prompts whose rollouts are kept; those of all others are left out."""
    exclude_prompt_ids: tuple[int, ...] = ()
    """Prompts whose rollouts are left out."""
    exclude_rollouts: tuple[int, ...] = ()
    """Rollout ids that are left out."""
    ranges: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Lowest and highest value, both included, of columns with a number a sequence: the user's
    (x_...) or the shard's own. None is no bound, and NaN never fits. Bounds of float columns are
    rounded to float32 first, as the values were."""

    def __post_init__(self) -> None:
        """Check values."""
        for name in ("max_lag", *(name for pair in PAIRS for name in pair)):
            value = getattr(self, name)
            if value is not None and value < 0:
                _refuse(name, "at least 0", value)
        for low, high in PAIRS:
            _check_order(high, getattr(self, low), getattr(self, high))
        for name, known in CODES.items():
            for value in getattr(self, name):
                if value not in known:
                    _refuse(name, f"some of {', '.join(known)}", value)
        for name in IDS:
            for value in getattr(self, name):
                if not 0 <= value < 2**64:
                    _refuse(name, "ids from 0 to 2^64 - 1", value)
        for name, bounds in self.ranges.items():
            _check_range(name, bounds)

    def digest(self) -> str:
        """Hash of what is kept, 32 hexadecimal digits; the order of names and ids does not
        count."""
        value: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        value |= {name: sorted(set(value[name])) for name in (*CODES, *IDS)}
        value["ranges"] = {
            name: [None if bound is None else float(bound) for bound in bounds]
            for name, bounds in self.ranges.items()
        }
        return jsonfile.digest(jsonfile.dump(value))


class Conditions:
    """A filter made ready for many shards: all of it but `max_lag`, which takes a whole snapshot.

    Args:
        rows: the filter.
    """

    def __init__(self, rows: RowFilter) -> None:
        """Sort ids and codes once."""
        self._rows = rows
        self._wanted: dict[str, np.ndarray] = {}
        for name in (*CODES, *IDS):
            given = getattr(rows, name)
            numbers = [CODES[name].index(value) for value in given] if name in CODES else given
            if numbers:
                self._wanted[name] = np.unique(np.array(numbers, np.uint64))
        self.names = (*_limits(), *CODES, *IDS, *rows.ranges)
        """Of all conditions, in the order in which `held` gives them."""

    @property
    def columns(self) -> set[str]:
        """Columns of a shard that the filter looks at, those of `max_lag` too."""
        rows = self._rows
        given = (n for n in COLUMN_OF if getattr(rows, n) is not None and getattr(rows, n) != ())
        return {COLUMN_OF[name] for name in given} | set(rows.ranges)

    def held(
        self, lengths: np.ndarray, columns: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each condition's name and which rows meet it.

        Args:
            lengths: (rows, 3) tokens, prompt tokens and positions.
            columns: `columns` and perhaps others, (rows,) each.

        Yields:
            One of `names`, and (rows,) bool.
        """
        for name in _limits():
            limit = getattr(self._rows, name)
            if limit is not None:
                at = {"tokens": 0, "positions": 2}.get(name[4:])
                values = columns[COLUMN_OF[name]] if at is None else lengths[:, at]
                is_low = name.startswith("min_")
                yield name, values >= limit if is_low else (values <= limit) & (values >= 0)
        for name, wanted in self._wanted.items():
            found = _among(columns[COLUMN_OF[name]], wanted)
            yield name, ~found if name.startswith("exclude_") else found
        for name, (low, high) in self._rows.ranges.items():
            yield name, _within(columns[name], low, high)


def _limits() -> tuple[str, ...]:
    return tuple(name for pair in PAIRS for name in pair)


def _among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which values are in a sorted list that is not empty."""
    at = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    return np.asarray(wanted[at] == values)


def _within(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    fits: np.ndarray = ~np.isnan(values)
    is_float = values.dtype.kind == "f"
    with np.errstate(over="ignore"):
        if low is not None:
            fits &= values >= (values.dtype.type(low) if is_float else math.ceil(low))
        if high is not None:
            fits &= values <= (values.dtype.type(high) if is_float else math.floor(high))
    return fits


def _check_range(name: str, bounds: Any) -> None:
    key = f"ranges, {name!r}"
    if name not in RANGED and not USER_NAME.fullmatch(name):
        _refuse(key, f"a user's column x_... or one of {', '.join(RANGED)}", name)
    if len(bounds) != 2:
        _refuse(key, "a lowest and a highest value", bounds)
    for bound in bounds:
        if bound is not None and not math.isfinite(bound):
            _refuse(key, "finite numbers, or nothing for no bound", bound)
    _check_order(key, *bounds)


def _check_order(name: str, low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        _refuse(name, f"at least the lowest, {low}", high)


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ConfigError(f"rows.{name}", expected, repr(got), "Correct the filter.")
