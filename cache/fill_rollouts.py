"""What rollouts from elsewhere leave open, and what they must not contradict.

A row that says nothing else is of an unknown policy, from an import, finished for an unknown reason
and without a stop token; rows of one import with equal prompts are a group, numbered in their
order.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from stillroom.cache.lists import list_column
from stillroom.cache.part import prompt_id, rollout_id
from stillroom.cache.schema import PART_SCHEMA

UNKNOWN_POLICY = -1


def fill_rollouts(table: pa.Table, policy_version: int | None, name: str = "") -> pa.Table:
    """All columns of a part; `rollout_id` stays null where it is not given.

    Args:
        table: rows with a part's column types, `prompt` and `completion` among them.
        policy_version: policy that sampled the rows that name none; None is unknown.
        name: of what is imported, which goes into the groups of rows that have none, so that those
            of two imports differ.
    """
    rows = len(table)

    def given(name: str) -> pa.ChunkedArray | pa.Array:
        kind = PART_SCHEMA.field(name).type
        return table[name] if name in table.column_names else pa.nulls(rows, kind)

    def constant(name: str, value: object) -> pa.Scalar:
        return pa.scalar(value, PART_SCHEMA.field(name).type)

    prompt_ids = _prompt_ids(table)
    group = pc.coalesce(given("group"), pa.array(_groups(prompt_ids, name)))
    sampled_by = UNKNOWN_POLICY if policy_version is None else policy_version
    lowest, highest = given("policy_version_min"), given("policy_version_max")
    policy = constant("policy_version_min", sampled_by)
    columns = {name: given(name) for name in PART_SCHEMA.names} | {
        "prompt_id": pa.array(prompt_ids),
        "group": group,
        "sample_index": pc.coalesce(given("sample_index"), pa.array(_count(group.to_numpy()))),
        "policy_version_min": pc.coalesce(lowest, highest, policy),
        "policy_version_max": pc.coalesce(highest, lowest, policy),
    }
    defaults = {"finish_reason": "unknown", "source": "import", "ends_with_stop": False}
    for name, value in defaults.items():
        columns[name] = pc.coalesce(given(name), constant(name, value))
    columns |= {n: table[n] for n in table.column_names if n not in columns}
    return pa.table(columns)


def name_rollouts(table: pa.Table, unit: str) -> pa.Table:
    """Give rollouts of a unit that have no `rollout_id` the one of their place in it."""
    own = pa.array([rollout_id(unit, i) for i in range(len(table))], pa.uint64())
    at = table.column_names.index("rollout_id")
    return table.set_column(at, "rollout_id", pc.coalesce(table["rollout_id"], own))


def contradictions(table: pa.Table) -> Iterator[tuple[int, str]]:
    """Rows that say of themselves what cannot be so, each as its index and the reason.

    Args:
        table: rows as they were given, with a part's column types.
    """
    has = set(table.column_names)
    if "prompt_id" in has:
        hashes = pa.array(_prompt_ids(table))
        for row in _true(pc.not_equal(table["prompt_id"], hashes)):
            yield row, f"prompt_id {table['prompt_id'][row]}, but its ids hash to {hashes[row]}"
    versions = [n for n in ("policy_version_min", "policy_version_max") if n in has]
    for name in versions:
        for row in _true(pc.less(table[name], UNKNOWN_POLICY)):
            yield row, f"{name} {table[name][row]}, below {UNKNOWN_POLICY} (unknown)"
    if len(versions) == 2:
        for row in _true(pc.greater(*(table[name] for name in versions))):
            yield row, "a policy_version_min above its policy_version_max"
    if "rollout_id" in has:
        ids = table["rollout_id"].drop_null().to_numpy()
        rows = np.flatnonzero(table["rollout_id"].is_valid().to_numpy())
        _, first = np.unique(ids, return_index=True)
        for at in np.delete(np.arange(len(ids)), first).tolist():
            yield int(rows[at]), f"a rollout_id that an earlier row has, {ids[at]}"


def positions(table: pa.Table) -> np.ndarray:
    """(rows,) int64: scored tokens of each row."""
    completion = list_column(table["completion"])
    if "scored" not in table.column_names:
        return completion.lengths
    scored = list_column(table["scored"])
    ones = scored.count_in_row(scored.values == 1)
    return np.where(scored.is_null, completion.lengths, ones)


def _prompt_ids(table: pa.Table) -> np.ndarray:
    prompt = list_column(table["prompt"])
    return np.array([prompt_id(prompt.row(i)) for i in range(len(table))], np.uint64)


def _groups(prompt_ids: np.ndarray, name: str) -> np.ndarray:
    """(rows,) uint64: a group for each prompt of what is imported."""
    prompts, at = np.unique(prompt_ids, return_inverse=True)
    hashes = [xxhash.xxh3_64_intdigest(f"{name}/{prompt}".encode()) for prompt in prompts]
    groups: np.ndarray = np.array(hashes, np.uint64)[at]
    return groups


def _count(group: np.ndarray) -> np.ndarray:
    """(rows,) uint32: how many earlier rows are of the same group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    new = np.append(True, ordered[1:] != ordered[:-1]) if len(group) else np.empty(0, bool)
    starts = np.flatnonzero(new)
    counted = np.empty(len(group), np.uint32)
    counted[order] = np.arange(len(group)) - starts[np.cumsum(new) - 1]
    return counted


def _true(mask: pa.ChunkedArray) -> list[int]:
    return [int(row) for row in np.flatnonzero(pc.fill_null(mask, False).to_numpy())]
