"""Rollouts that bring ids of their own, compared with the cache: no two may have the same id, and
one that is there already is not stored again."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.checked_rollouts import CheckedRollouts
from stillroom.cache.content_hash import content_hash
from stillroom.cache.errors import MismatchError, MissingError
from stillroom.cache.fill_rollouts import UNKNOWN_POLICY, fill_rollouts
from stillroom.cache.part import PartMeta

if TYPE_CHECKING:
    from stillroom.cache.store import Cache

THREADS = 8
NUMBERED = ("group", "sample_index")
"""Columns that depend on the import where a row leaves them open."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What an import says of the sampling of its rollouts."""

    policy_version: int | None
    sampler: dict[str, Any]

    def check(self, where: str, part: str, meta: PartMeta, stored: pa.Table, own: pa.Table) -> None:
        """Refuse rollouts that a part holds with other claims.

        Args:
            where: the file or table, for messages.
            part: the part.
            meta: what it says of its rollouts.
            stored: its rows.
            own: the same rows as they would be stored.

        Raises:
            MismatchError: a policy or the sampler differs.
        """
        theirs = (meta.policy_version, meta.sampler)
        names = ("policy_version_min", "policy_version_max")
        same = all(stored[name].equals(own[name]) for name in names)
        if theirs != (self.policy_version or 0, self.sampler) or not same:
            known = f"policy {_policies(stored)} and sampler {meta.sampler}"
            got = f"policy {_policies(own)} and sampler {self.sampler}"
            do = "Import them with those settings, or into another cache."
            held = f"{known}, with which {part} holds the same rollouts"
            raise MismatchError(where, held, f"{got}, for v{self.policy_version or 0:06d}", do)


@dataclass(frozen=True, slots=True)
class ComparedRollouts:
    """Rollouts of one file or table, none of which has another one's id."""

    rollouts: CheckedRollouts
    holder: np.ndarray
    """(rows,) strings: the part that holds the same rollout under the same id; empty if none."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where the cache holds ids, ascending."""

    ids: np.ndarray
    part: np.ndarray
    row: np.ndarray


def compare_ids(
    cache: "Cache", files: Sequence[CheckedRollouts], claims: Claims, *, skip_bad: bool
) -> list[ComparedRollouts]:
    """Compare ids that rows bring over all files, and with every part of the cache.

    Args:
        cache: the cache; its parts are read where a row brings an id.
        files: rollouts; ids are compared within each already.
        claims: of the import.
        skip_bad: leave out rows whose id another rollout has.

    Raises:
        InputError: another rollout has a row's id; names the row.
        MismatchError: the same rollouts are there with other claims.
    """
    given = [_given(one.table) for one in files]
    wanted = np.unique(np.concatenate([ids for _, ids in given]))
    stored = _find(cache, wanted)
    out = []
    for one, own, twice in zip(files, given, _repeated(files, given), strict=True):
        holder = np.full(len(one.table), "", object)
        problems = dict(twice)
        for part, rows, at in _hits(stored, *own):
            holder[rows] = part
            for i, names in _different(cache, one, rows, (part, at), claims).items():
                problem = f"a rollout_id that {part} holds with another {', '.join(names)}"
                problems.setdefault(int(rows[i]), problem)
        kept = np.delete(holder, list(problems))
        out.append(ComparedRollouts(one.without(problems, skip_bad=skip_bad), kept))
    return out


def _given(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Rows that bring an id, and their ids."""
    if "rollout_id" not in table.column_names:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    column = table["rollout_id"]
    return np.flatnonzero(column.is_valid().to_numpy()), column.drop_null().to_numpy()


def _repeated(
    files: Sequence[CheckedRollouts], given: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[dict[int, str]]:
    """Rows of each file whose id an earlier file has."""
    ids = np.concatenate([ids for _, ids in given])
    file = np.repeat(np.arange(len(files)), [len(ids) for _, ids in given])
    row = np.concatenate([rows for rows, _ in given])
    _, first, at = np.unique(ids, return_index=True, return_inverse=True)
    out: list[dict[int, str]] = [{} for _ in files]
    for i in np.flatnonzero(first[at] != np.arange(len(ids))).tolist():
        earlier = files[file[first[at[i]]]].where
        out[file[i]][int(row[i])] = f"a rollout_id that a row of {earlier} has, {ids[i]}"
    return out


def _find(cache: "Cache", wanted: np.ndarray) -> _Stored:
    """Where the cache holds these ids."""
    parts = cache.parts() if len(wanted) else []
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(partial(_ids_in, cache, wanted), parts))
    ids = np.concatenate([np.empty(0, np.uint64), *(ids for ids, _ in found)])
    row = np.concatenate([np.empty(0, np.int64), *(rows for _, rows in found)])
    part = np.repeat(np.array(parts, object), [len(ids) for ids, _ in found])
    order = np.argsort(ids, kind="stable")
    return _Stored(ids[order], part[order], row[order])


def _ids_in(cache: "Cache", wanted: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        ids = cache.rollout_ids(part)
    except MissingError:  # gc has removed it since
        ids = np.empty(0, np.uint64)
    rows = np.flatnonzero(np.isin(ids, wanted))
    return ids[rows], rows


def _hits(
    stored: _Stored, rows: np.ndarray, ids: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each part that holds some of the ids, the rows that bring them, and its rows of them."""
    at = np.searchsorted(stored.ids, ids)
    hit = np.isin(ids, stored.ids)
    rows, at = rows[hit], at[hit]
    for part in sorted(set(stored.part[at])):
        own = stored.part[at] == part
        yield part, rows[own], stored.row[at[own]]


def _different(
    cache: "Cache",
    one: CheckedRollouts,
    rows: np.ndarray,
    held: tuple[str, np.ndarray],
    claims: Claims,
) -> dict[int, list[str]]:
    """Which of some rows differ from those that a part holds under their ids, and in what."""
    part, at = held
    table, meta, _ = cache.read_part(part)
    stored, given = table.take(at), one.table.take(rows)
    own = fill_rollouts(given, claims.policy_version)
    for name in NUMBERED:
        open_to = given[name] if name in given.column_names else pa.nulls(len(rows))
        column = pc.coalesce(open_to.cast(stored[name].type), stored[name])
        own = own.set_column(own.column_names.index(name), name, column)
    found: dict[int, list[str]] = {}
    if anywhere := _differing(own, stored, dict.fromkeys([*own.column_names, *table.column_names])):
        for i in range(len(rows)):
            if names := _differing(own.slice(i, 1), stored.slice(i, 1), anywhere):
                found[i] = names
    same = np.delete(np.arange(len(rows)), list(found))
    if len(same):
        claims.check(one.where, part, meta, stored.take(same), own.take(same))
    return found


def _differing(own: pa.Table, stored: pa.Table, among: Iterable[str]) -> list[str]:
    """Columns in which two tables of equally many rows differ."""

    def value(table: pa.Table, name: str) -> str:
        return content_hash(table.select([name] if name in table.column_names else []))

    return [name for name in among if value(own, name) != value(stored, name)]


def _policies(table: pa.Table) -> str:
    lowest = pc.min(table["policy_version_min"]).as_py()
    highest = pc.max(table["policy_version_max"]).as_py()
    low, high = ("unknown" if v == UNKNOWN_POLICY else f"{v}" for v in (lowest, highest))
    return low if low == high else f"{low} to {high}"
