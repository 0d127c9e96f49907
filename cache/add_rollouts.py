"""Checked rollouts from elsewhere become parts: what they leave open is filled in, and the same
rollouts always give the same parts."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.checked_rollouts import CheckedRollouts
from stillroom.cache.content_hash import content_hash
from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.fill_rollouts import fill_rollouts, name_rollouts, positions
from stillroom.cache.part import PartMeta
from stillroom.cache.progress import Progress

if TYPE_CHECKING:
    from stillroom.cache.store import Cache

PART_POSITIONS = 500_000


@dataclass(frozen=True, slots=True)
class PlannedParts:
    """Rollouts cut into parts."""

    new: list[tuple[pa.Table, PartMeta]]
    """Parts to write."""
    present: list[str]
    """Names of those that are there already."""
    left_out: list[tuple[int, str]]
    """Numbers of the rows that were left out, and why."""


@dataclass(slots=True)
class AddReport:
    """What became of rollouts."""

    added: list[str] = field(default_factory=list)
    """Parts that were written."""
    present: list[str] = field(default_factory=list)
    """Parts that were there already, with the same rollouts."""
    rollouts: int = 0
    """Rollouts in the parts that were written."""
    positions: int = 0
    """Scored tokens in them."""
    left_out: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of the rows that were left out, and why."""


def plan_parts(
    cache: "Cache",
    rollouts: CheckedRollouts,
    *,
    policy_version: int | None = None,
    sampler: dict[str, Any] | None = None,
    positions_per_part: int = PART_POSITIONS,
) -> PlannedParts:
    """Cut checked rollouts into parts, and see which are there; see `Cache.add_rollouts`.

    Raises:
        ConfigError: a setting is out of range.
        MismatchError: the rollouts are there, of another policy or sampler.
    """
    settings = {"temperature": None} if sampler is None else sampler
    _check_settings(policy_version, settings, positions_per_part)
    stored = cache.parts()
    there = {name[-16:]: name for name in (*cache.retired(), *stored)}
    filled = fill_rollouts(rollouts.table, policy_version)
    plan, start = PlannedParts([], [], rollouts.left_out), 0
    parts = _cut(rollouts.table, positions_per_part)
    for part, unit in zip(parts, _units(parts), strict=True):
        meta = PartMeta(
            policy_version=policy_version or 0,
            unit=unit,
            tokenizer_fingerprint=cache.identity.tokenizer_fingerprint,
            vocab_size=cache.identity.vocab_size,
            sampler=settings,
        )
        if unit not in there:
            plan.new.append((name_rollouts(filled.slice(start, len(part)), unit), meta))
        else:
            plan.present.append(there[unit])
            if there[unit] in stored:
                _check_same(cache, there[unit], meta, rollouts.where)
        start += len(part)
    return plan


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


def _cut(table: pa.Table, positions_per_part: int) -> list[pa.Table]:
    """Runs of rows of about that many positions; the last may have fewer."""
    counts = positions(table)
    part = (np.cumsum(counts) - counts) // positions_per_part
    starts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(table)]
    return [table.slice(a, b - a) for a, b in pairwise(starts)]


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


def _check_same(cache: "Cache", part: str, meta: PartMeta, where: str) -> None:
    """The same rollouts must not be there with other claims about their sampling."""
    _, known, _ = cache.read_part(part)
    mine, theirs = (meta.policy_version, meta.sampler), (known.policy_version, known.sampler)
    if mine != theirs:
        expected = f"policy and sampler {theirs}, with which {part} holds the same rollouts"
        do = "Import them with those settings, or into another cache."
        raise MismatchError(where, expected, f"{mine}", do)
