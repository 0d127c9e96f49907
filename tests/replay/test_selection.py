"""The selection: exactly the rows that a look at every row would choose, with as few reads."""

import itertools
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.cache.commits import Commit
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.part import prompt_id
from stillroom.cache.schema import FINISH_REASONS, PART_SCHEMA, SOURCES
from stillroom.cache.shard import Shard
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay import selection as selection_module
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import OVER_LONG, Selection, select
from tests.replay.conftest import (
    IDENTITY,
    add_scored_part,
    made_up_table,
    part_meta,
    score_table,
)

ALL = RowFilter()
PARTS = {0: 9, 1: 14, 2: 6, 3: 11}
LONGEST = 14


@dataclass
class StoredRow:
    """A row read whole."""

    part: int
    arrays: dict[str, Any]
    """Numbers of the sequence."""
    prompt: int
    scored: list[int]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens, prompt tokens, positions."""
        return len(self.scored), self.prompt, sum(self.scored)


def varied_table(version: int, rows: int) -> pa.Table:
    """Rollouts of prompts that are sampled up to four times, by several policies or by an unknown
    one, with a number that is sometimes NaN."""
    rng = np.random.default_rng([version, rows])
    table = made_up_table(rng, rows, version)
    records = table.to_pylist()
    for row, record in enumerate(records):
        first = records[row - row % 4]
        record |= {"prompt": first["prompt"], "prompt_id": first["prompt_id"]}
        oldest = int(rng.integers(-1, version + 1))
        record["policy_version_min"] = oldest
        record["policy_version_max"] = -1 if oldest < 0 else int(rng.integers(oldest, version + 1))
        record["finish_reason"] = FINISH_REASONS[rng.integers(len(FINISH_REASONS))]
        record["x_weight"] = None if row % 5 == 0 else float(row % 4)
    return pa.Table.from_pylist(records, table.schema)


@pytest.fixture(scope="session", params=["zarr", "parquet"])
def varied_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Four parts in which every kind of row comes."""
    root = tmp_path_factory.mktemp("varied") / "cache"
    cache = Cache.create(root, replace(IDENTITY, shard_format=request.param))
    for version, rows in PARTS.items():
        score_table(cache, varied_table(version, rows), part_meta(version, 0))
    return cache


def stored_rows(cache: Cache, snapshot: Snapshot) -> list[StoredRow]:
    """Every row of a snapshot, out of whole shards."""
    rows = []
    for part, commit in enumerate(snapshot.commits):
        arrays = cache.shard(commit).all_rows()
        start = arrays["sequence_start"]
        for i in range(commit.rows):
            numbers = {name: a[i].item() for name, a in arrays.items() if len(a) == commit.rows}
            scored = arrays["scored"][int(start[i]) : int(start[i + 1])].tolist()
            rows.append(StoredRow(part, numbers, int(arrays["prompt_length"][i]), scored))
    return rows


@pytest.fixture(scope="session")
def varied(varied_cache: Cache) -> Snapshot:
    """All of the varied cache."""
    return varied_cache.snapshot()


@pytest.fixture(scope="session")
def every_row(varied_cache: Cache, varied: Snapshot) -> list[StoredRow]:
    """The rows of the varied cache."""
    return stored_rows(varied_cache, varied)


def first_reason(row: StoredRow, rows: RowFilter, newest: int) -> str | None:
    """Why a filter leaves a row out, one rule after another."""
    tokens, _, positions = row.lengths
    low, high = row.arrays["policy_version_min"], row.arrays["policy_version_max"]
    checks = {
        "min_policy_version": rows.min_policy_version is not None and low < rows.min_policy_version,
        "max_policy_version": rows.max_policy_version is not None
        and (high < 0 or high > rows.max_policy_version),
        "min_tokens": rows.min_tokens is not None and tokens < rows.min_tokens,
        "max_tokens": rows.max_tokens is not None and tokens > rows.max_tokens,
        "min_positions": rows.min_positions is not None and positions < rows.min_positions,
        "max_positions": rows.max_positions is not None and positions > rows.max_positions,
        "finish_reasons": bool(rows.finish_reasons)
        and FINISH_REASONS[row.arrays["finish_reason"]] not in rows.finish_reasons,
        "sources": bool(rows.sources) and SOURCES[row.arrays["source"]] not in rows.sources,
        "prompt_ids": bool(rows.prompt_ids) and row.arrays["prompt_id"] not in rows.prompt_ids,
        "exclude_prompt_ids": row.arrays["prompt_id"] in rows.exclude_prompt_ids,
        "exclude_rollouts": row.arrays["rollout_id"] in rows.exclude_rollouts,
    }
    for name, (least, most) in rows.ranges.items():
        value = row.arrays[name]
        fits = (least is None or value >= least) and (most is None or value <= most)
        checks[name] = value != value or not fits
    checks["max_lag"] = rows.max_lag is not None and (low < 0 or newest - low > rows.max_lag)
    return next((name for name, is_left_out in checks.items() if is_left_out), None)


@dataclass
class Expected:
    """What a selection must be."""

    rows: list[int]
    lengths: list[tuple[int, int, int]]
    unit_start: list[int]
    left_out: dict[str, int]
    truncated: int
    over_long: int


def by_hand(
    every: list[StoredRow], rows: RowFilter, max_tokens: int, over_long: str, group_rows: int
) -> Expected:
    """The selection, row by row."""
    newest = max(row.arrays["policy_version_min"] for row in every)
    out = Expected([], [], [], {}, 0, 0)
    left_out: Counter[str] = Counter()
    held: list[StoredRow] = []
    for number, row in enumerate(every):
        reason, lengths = first_reason(row, rows, newest), row.lengths
        is_over = reason is None and lengths[0] > max_tokens
        if is_over:
            out.over_long += 1
            lengths = (max_tokens, row.prompt, sum(row.scored[:max_tokens]))
            if over_long == "skip":
                reason = "over_long"
            elif not lengths[2]:
                reason = "no_position"
        if reason is not None:
            left_out[reason] += 1
            continue
        out.truncated += is_over
        unit = held[out.unit_start[-1] :] if held else []
        is_same = all(
            (other.part, other.arrays["prompt_id"]) == (row.part, row.arrays["prompt_id"])
            for other in unit
        )
        if not unit or len(unit) == group_rows or not is_same:
            out.unit_start.append(len(held))
        held.append(row)
        out.rows.append(number)
        out.lengths.append(lengths)
    out.unit_start.append(len(held))
    out.left_out = dict(left_out)
    return out


def assert_is(found: Selection, expected: Expected) -> None:
    """All arrays and counts are the expected ones."""
    assert found.rows.dtype == np.int64
    assert found.lengths.dtype == np.uint32
    assert found.unit_start.dtype == np.int64
    assert found.rows.tolist() == expected.rows
    assert found.lengths.tolist() == [list(lengths) for lengths in expected.lengths]
    assert found.unit_start.tolist() == expected.unit_start
    assert found.left_out == expected.left_out
    assert found.truncated == expected.truncated


def bounds(highest: int) -> st.SearchStrategy[tuple[int | None, int | None]]:
    """A lowest and a highest number, or none."""

    def in_order(pair: tuple[int | None, int | None]) -> bool:
        low, high = pair
        return low is None or high is None or low <= high

    number = st.none() | st.integers(0, highest)
    return st.tuples(number, number).filter(in_order)


@st.composite
def filters(draw: st.DrawFn, every: list[StoredRow]) -> RowFilter:
    """Filters of a few conditions, most of which leave something."""
    ids = {name: [row.arrays[name] for row in every] for name in ("prompt_id", "rollout_id")}
    some = {name: st.lists(st.sampled_from([5, *values])) for name, values in ids.items()}
    values: dict[str, Any] = {}
    if draw(st.booleans()):
        what, highest = draw(
            st.sampled_from([("policy_version", 3), ("tokens", LONGEST), ("positions", 9)])
        )
        values[f"min_{what}"], values[f"max_{what}"] = draw(bounds(highest))
    optional = {
        "max_lag": st.integers(0, 4),
        "finish_reasons": st.lists(st.sampled_from(FINISH_REASONS)).map(tuple),
        "sources": st.lists(st.sampled_from(SOURCES)).map(tuple),
        "prompt_ids": st.lists(st.sampled_from(ids["prompt_id"]), max_size=12).map(tuple),
        "exclude_prompt_ids": some["prompt_id"].map(tuple),
        "exclude_rollouts": some["rollout_id"].map(tuple),
        "ranges": st.dictionaries(
            st.sampled_from(["x_weight", "prompt_length", "sample_index"]), bounds(4), max_size=2
        ),
    }
    for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True)):
        values[name] = draw(optional[name])
    return RowFilter(**values)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_selection_is_what_a_look_at_every_row_finds(
    varied_cache: Cache, varied: Snapshot, every_row: list[StoredRow], data: st.DataObject
) -> None:
    rows = data.draw(filters(every_row))
    max_tokens = data.draw(st.integers(1, LONGEST))
    over_long = data.draw(st.sampled_from(OVER_LONG))
    group_rows = data.draw(st.integers(1, 5))
    expected = by_hand(every_row, rows, max_tokens, over_long, group_rows)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "over_long": over_long,
        "group_rows": group_rows,
        "threads": 3,
    }
    if over_long == "refuse" and expected.over_long:
        with pytest.raises(InputError, match=f"{max_tokens}, and {expected.over_long} rows"):
            select(varied_cache, varied, rows, **options)
        return
    if not expected.rows:
        with pytest.raises(InputError, match=f"none of {len(every_row)}") as caught:
            select(varied_cache, varied, rows, **options)
        for name, count in expected.left_out.items():
            assert f"{count} by {name}" in caught.value.got
        return
    found = select(varied_cache, varied, rows, with_policy=True, **options)
    assert_is(found, expected)
    policy = [every_row[row].arrays["policy_version_min"] for row in expected.rows]
    assert found.policy is not None
    assert found.policy.tolist() == policy
    starts = expected.unit_start
    groups = [policy[a:b] for a, b in itertools.pairwise(starts)]
    oldest = [min((one for one in group if one >= 0), default=-1) for group in groups]
    assert found.unit_policy.tolist() == oldest


def test_everything(varied_cache: Cache, varied: Snapshot, every_row: list[StoredRow]) -> None:
    found = select(varied_cache, varied, ALL, max_tokens=LONGEST)
    assert found.rows.tolist() == list(range(sum(PARTS.values())))
    assert found.lengths.tolist() == [list(row.lengths) for row in every_row]
    assert (found.left_out, found.truncated, found.policy) == ({}, 0, None)


def test_rows_without_gaps_are_truncated_without_a_read(
    empty_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = made_up_table(np.random.default_rng(5), 20, 0)
    scored = pa.nulls(table.num_rows, table.schema.field("scored").type)
    at = table.schema.get_field_index("scored")
    score_table(empty_cache, table.set_column(at, "scored", scored), part_meta(0, 0))
    snapshot = empty_cache.snapshot()
    expected = by_hand(stored_rows(empty_cache, snapshot), ALL, 5, "truncate", 1)
    assert expected.truncated
    assert expected.left_out["no_position"]
    counts = count_reads(monkeypatch)
    found = select(empty_cache, snapshot, ALL, max_tokens=5, over_long="truncate")
    assert_is(found, expected)
    assert not counts


def test_truncated_rows_are_looked_at_a_few_at_a_time(
    varied_cache: Cache,
    varied: Snapshot,
    every_row: list[StoredRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where not every completion token is scored, the mask says how many positions are left."""
    monkeypatch.setattr(selection_module, "SPANS", 2)
    counts = count_reads(monkeypatch)
    found = select(varied_cache, varied, ALL, max_tokens=6, over_long="truncate")
    assert_is(found, by_hand(every_row, ALL, 6, "truncate", 1))
    assert counts["get_ranges"] > len(PARTS)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls that reach a storage from now on."""
    counts: Counter[str] = Counter()
    for name in ("get", "get_many", "get_ranges", "exists", "size", "entry", "list", "list_all"):
        original = getattr(Storage, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **more)

        monkeypatch.setattr(Storage, name, counted)
    return counts


def test_ten_thousand_shards_are_not_touched_for_their_lengths(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no such shards: a read would fail."""
    (first, *_) = scored_cache.snapshot().commits
    commits = [replace(first, part=f"v000000-{i:016x}") for i in range(10_000)]
    counts = count_reads(monkeypatch)
    rows = RowFilter(min_tokens=6, max_positions=8)
    found = select(scored_cache, Snapshot(tuple(commits)), rows, max_tokens=9, over_long="skip")
    tokens, _, positions = first.row_lengths().T
    fits = np.flatnonzero((tokens >= 6) & (positions <= 8) & (tokens <= 9))
    assert 0 < len(fits) < first.rows
    assert found.rows.tolist() == (np.arange(10_000)[:, None] * first.rows + fits).ravel().tolist()
    assert sum(found.left_out.values()) == 10_000 * (first.rows - len(fits))
    assert not counts


def test_a_shard_is_asked_once_for_all_columns(
    scored_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest, and one request for the ranges."""
    snapshot = scored_cache.snapshot()
    counts = count_reads(monkeypatch)
    rows = RowFilter(max_lag=1, finish_reasons=("stop",), exclude_rollouts=(1,))
    select(scored_cache, snapshot, rows, max_tokens=LONGEST, group_rows=2)
    assert counts == {"get": 3, "get_ranges": 3}


def test_no_more_shards_are_open_than_threads(
    empty_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit in range(12):
        add_scored_part(empty_cache, 0, unit, 3)
    opened: weakref.WeakSet[Shard] = weakref.WeakSet()
    most, lock, original = [0], threading.Lock(), Cache.shard

    def counted(self: Cache, commit: Commit) -> Shard:
        shard = original(self, commit)
        with lock:
            opened.add(shard)
            most.append(len(opened))
        return shard

    monkeypatch.setattr(Cache, "shard", counted)
    rows = RowFilter(sources=("student", "teacher"))
    select(empty_cache, empty_cache.snapshot(), rows, max_tokens=LONGEST, threads=2)
    assert len(most) == 13
    assert max(most) <= 2


def test_the_policy_is_the_row_s_and_not_the_part_s(empty_cache: Cache) -> None:
    """An import may bring rows of several policies in one part."""
    table = varied_table(3, 8)
    score_table(empty_cache, table, part_meta(0, 0))
    snapshot = empty_cache.snapshot()
    found = select(empty_cache, snapshot, ALL, max_tokens=LONGEST, with_policy=True)
    assert found.policy is not None
    assert found.policy.tolist() == table["policy_version_min"].to_pylist()
    assert snapshot.commits[0].policy_version == 0


def test_the_digest_tells_selections_apart(scored_cache: Cache) -> None:
    snapshot = scored_cache.snapshot()

    def digest(rows: RowFilter = ALL, **options: Any) -> str:
        given = {"max_tokens": LONGEST, "over_long": "truncate", **options}
        return select(scored_cache, snapshot, rows, **given).digest

    assert digest() == digest() == digest(RowFilter(min_tokens=1), with_policy=True, threads=1)
    others = [digest(RowFilter(min_tokens=9)), digest(max_tokens=9)]
    assert len({digest(), *others}) == 3


def test_units_are_part_of_the_digest(varied_cache: Cache, varied: Snapshot) -> None:
    digests = {
        select(varied_cache, varied, ALL, max_tokens=LONGEST, group_rows=n).digest
        for n in (1, 2, 3)
    }
    assert len(digests) == 3


def test_a_unit_ends_with_its_part(empty_cache: Cache) -> None:
    """Two parts of one prompt's samples, three each."""
    for unit in range(2):
        records = made_up_table(np.random.default_rng(unit), 3, 0).to_pylist()
        prompt = {"prompt": [1, 2, 3], "prompt_id": prompt_id(np.array([1, 2, 3], np.uint32))}
        table = pa.Table.from_pylist([record | prompt for record in records], PART_SCHEMA)
        score_table(empty_cache, table, part_meta(0, unit))
    found = select(empty_cache, empty_cache.snapshot(), ALL, max_tokens=LONGEST, group_rows=4)
    assert found.unit_start.tolist() == [0, 3, 6]


def test_a_column_that_a_shard_lacks(empty_cache: Cache) -> None:
    add_scored_part(empty_cache, 0, 0, 4)
    table = made_up_table(np.random.default_rng(1), 4, 0).drop_columns(["x_weight"])
    name = score_table(empty_cache, table, part_meta(0, 1))
    rows = RowFilter(ranges={"x_weight": (0, None)})
    with pytest.raises(
        InputError, match=f"{name}.*a column 'x_weight'; got topk_id, .*x_advantage"
    ):
        select(empty_cache, empty_cache.snapshot(), rows, max_tokens=LONGEST)


def test_a_column_with_a_number_a_position(scored_cache: Cache) -> None:
    rows = RowFilter(ranges={"x_advantage": (0, None)})
    with pytest.raises(InputError, match=r"v000000-.*x_advantage.*one a position"):
        select(scored_cache, scored_cache.snapshot(), rows, max_tokens=LONGEST)


def test_damaged_columns_are_an_error(empty_cache: Cache) -> None:
    add_scored_part(empty_cache, 0, 0, 4)
    snapshot = empty_cache.snapshot()
    path = Path(empty_cache.storage.describe(empty_cache.shard(snapshot.commits[0]).path))
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    with pytest.raises(CorruptError, match="source, chunk 0"):
        select(empty_cache, snapshot, RowFilter(sources=("student",)), max_tokens=LONGEST)
    assert len(select(empty_cache, snapshot, ALL, max_tokens=LONGEST).rows) == 4


def test_over_long_rows_are_refused_by_name(scored_cache: Cache) -> None:
    snapshot = scored_cache.snapshot()
    tokens = np.concatenate([c.row_lengths()[:, 0] for c in snapshot.commits])
    over = int((tokens > 9).sum())
    needed = f"max_tokens: expected at least the longest row's {tokens.max()} tokens"
    with pytest.raises(InputError, match=f"{needed}; got 9, and {over} rows have more.*'skip'"):
        select(scored_cache, snapshot, ALL, max_tokens=9)
    kept = select(scored_cache, snapshot, RowFilter(max_tokens=9), max_tokens=9)
    assert kept.left_out == {"max_tokens": over}


def test_an_empty_snapshot(empty_cache: Cache) -> None:
    with pytest.raises(InputError, match="rows to replay; got an empty snapshot"):
        select(empty_cache, empty_cache.snapshot(), ALL, max_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over_long": "cut"}, "over_long.*refuse.*got 'cut'"),
        ({"max_tokens": 0}, "max_tokens.*at least 1"),
        ({"group_rows": 0}, "group_rows.*at least 1"),
    ],
)
def test_bad_settings(scored_cache: Cache, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(scored_cache, scored_cache.snapshot(), ALL, **{"max_tokens": 99, **changes})
