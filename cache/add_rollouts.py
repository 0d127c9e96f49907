"""Checked rollouts from elsewhere become parts: what they leave open is filled in, and the same
rollouts always give the same parts."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.checked_rollouts import CheckedRollouts
from stillroom.cache.content_hash import content_hash
from stillroom.cache.errors import ConfigError
from stillroom.cache.fill_rollouts import fill_rollouts, name_rollouts, positions
from stillroom.cache.part import PartMeta
from stillroom.cache.progress import Progress
from stillroom.cache.rollout_ids import Claims, ComparedRollouts, compare_ids

if TYPE_CHECKING:
    from stillroom.cache.store import Cache

PART_POSITIONS = 500_000


@dataclass(frozen=True, slots=True)
class PlannedParts:
    """Rollouts cut into parts."""

    new: list[tuple[pa.Table, PartMeta]]
    """Parts to write."""
    present: list[str]
    """Names of those that are there already, whole or with some of the rollouts."""
    left_out: list[tuple[int, str]]
    """Numbers of the rows that were left out, and why."""


@dataclass(slots=True)
class AddReport:
    """What became of rollouts."""

    added: list[str] = field(default_factory=list)
    """Parts that were written."""
    present: list[str] = field(default_factory=list)
    """Parts that were there already, with the same rollouts or some of them."""
    rollouts: int = 0
    """Rollouts in the parts that were written."""
    positions: int = 0
    """Scored tokens in them."""
    left_out: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of the rows that were left out, and why."""


def plan_parts(
    cache: "Cache",
    files: Sequence[CheckedRollouts],
    *,
    policy_version: int | None = None,
    sampler: dict[str, Any] | None = None,
    positions_per_part: int = PART_POSITIONS,
    skip_bad: bool = False,
) -> list[PlannedParts]:
    """Cut checked rollouts into parts, file by file, and see which are there; see
    `Cache.add_rollouts`.

    Raises:
        ConfigError: a setting is out of range.
        InputError: another rollout has the id of a row, which is named.
        MismatchError: the rollouts are there, of another policy or sampler.
    """
    settings = {"temperature": None} if sampler is None else sampler
    _check_settings(policy_version, settings, positions_per_part)
    claims = Claims(policy_version, settings)
    compared = compare_ids(cache, files, claims, skip_bad=skip_bad)
    stored = cache.parts()
    there = {name[-16:]: name for name in (*cache.retired(), *stored)}
    return [_plan(cache, one, claims, positions_per_part, there, stored) for one in compared]


def _plan(
    cache: "Cache",
    compared: ComparedRollouts,
    claims: Claims,
    positions_per_part: int,
    there: Mapping[str, str],
    stored: Collection[str],
) -> PlannedParts:
    """Parts of one file: `there` is what the cache has or had, by unit, and `stored` what it has.

    Parts are cut before rows that are held are left out, so that two imports of a file at once cut
    it alike.
    """
    table, holder = compared.rollouts.table, compared.holder
    parts = _cut(table, positions_per_part)
    units = _units(table.take(rows) for rows in parts)
    name = jsonfile.digest("/".join(units).encode())
    filled = fill_rollouts(table, claims.policy_version, name)
    new, present = list[tuple[pa.Table, PartMeta]](), dict[str, None]()
    for rows, whole in zip(parts, units, strict=True):
        left = rows[holder[rows] == ""]
        present |= dict.fromkeys(name for name in holder[rows] if name)
        if not len(left):
            continue
        (unit,) = [whole] if len(left) == len(rows) else _units([table.take(left)])
        if unit not in there:
            meta = _meta(cache, claims, unit)
            new.append((name_rollouts(filled.take(left), unit), meta))
            continue
        part = there[unit]
        present[part] = None
        if part in stored:
            held, known, _ = cache.read_part(part)
            claims.check(compared.rollouts.where, part, known, held, filled.take(left))
    return PlannedParts(new, list(present), compared.rollouts.left_out)


def _meta(cache: "Cache", claims: Claims, unit: str) -> PartMeta:
    return PartMeta(
        policy_version=claims.policy_version or 0,
        unit=unit,
        tokenizer_fingerprint=cache.identity.tokenizer_fingerprint,
        vocab_size=cache.identity.vocab_size,
        sampler=claims.sampler,
    )


def add_parts(cache: "Cache", plan: PlannedParts) -> AddReport:
    """Write planned parts; one that another process has written meanwhile is left as it is."""
    cache.storage.check_conditional_puts()
    report = AddReport(present=list(plan.present), left_out=plan.left_out)
    with Progress("add rollouts", sum(len(part) for part, _ in plan.new), "rollouts") as progress:
        for part, meta in plan.new:
            if cache.add_part(part, meta):
                report.added.append(meta.name)
                report.rollouts += len(part)
                report.positions += int(positions(part).sum())
            else:
                report.present.append(meta.name)
            progress.advance(len(part))
    return report


def _check_settings(
    policy_version: int | None, sampler: dict[str, Any], positions_per_part: int
) -> None:
    if policy_version is not None and not 0 <= policy_version < 10**9:
        got, expected = repr(policy_version), "0 to 999,999,999, or None if unknown"
        raise ConfigError("policy_version", expected, got, "Change it.")
    if positions_per_part < 1:
        raise ConfigError("positions_per_part", "at least 1", f"{positions_per_part}", "Raise it.")
    temperature = sampler.get("temperature")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (is_number and 0 < temperature < math.inf):
        expected = "a positive number, or None if unknown"
        raise ConfigError("sampler temperature", expected, repr(temperature), "Change it.")
    try:
        jsonfile.dump(sampler)
    except (TypeError, ValueError) as error:
        do = "Give numbers, strings, lists and mappings, and no NaN."
        raise ConfigError("sampler", "what JSON can hold", str(error), do) from error


def _cut(table: pa.Table, positions_per_part: int) -> list[np.ndarray]:
    """Rows of each part, of about that many positions; the last may have fewer. Rows with an id and
    rows without share none: the former are known again one by one, the latter by their part."""
    counts = positions(table)
    has_id = np.zeros(len(table), bool)
    if "rollout_id" in table.column_names:
        has_id = table["rollout_id"].is_valid().to_numpy()
    parts = []
    for rows in (np.flatnonzero(has_id), np.flatnonzero(~has_id)):
        part = (np.cumsum(counts[rows]) - counts[rows]) // positions_per_part
        runs = np.split(rows, np.flatnonzero(np.diff(part)) + 1)
        parts += [run for run in runs if len(run)]
    return parts


def _units(parts: Iterable[pa.Table]) -> list[str]:
    """A name for the content of each part; equal ones are told apart by their order."""
    seen: Counter[str] = Counter()
    units = []
    for part in parts:
        unit = content_hash(part)
        seen[unit] += 1
        again = jsonfile.digest(f"{unit}/{seen[unit]}".encode())
        units.append((unit if seen[unit] == 1 else again)[:16])
    return units
