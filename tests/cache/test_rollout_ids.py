"""Ids that rollouts bring are unique in a cache; what it holds already is not stored again."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.checked_rollouts import CheckedRollouts, check_rollouts, one_batch
from stillroom.cache.errors import CorruptError, InputError, MismatchError
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, seal
from stillroom.cache.part import METADATA_KEY, decode_rollout_ids
from stillroom.cache.rollout_ids import Claims, compare_ids
from stillroom.cache.store import Cache
from tests.cache.fakes import make_identity

UNKNOWN = Claims(None, {"temperature": None})


def row(rollout_id: int | str | None, **changes: Any) -> dict[str, Any]:
    """A rollout with this id."""
    return {"rollout_id": rollout_id, "prompt": [1, 2], "completion": [3, 4]} | changes


def checked(rows: Any, where: str = "f") -> CheckedRollouts:
    """Rows of one file."""
    return check_rollouts([one_batch(rows, where)], make_identity(), where, skip_bad=True)


def grown(count: int, *, ids: bool = True) -> list[dict[str, Any]]:
    """The first rows of a file that grows: three samples of each prompt, one position each."""
    return [
        row(i if ids else None, prompt=[i // 3 % 7, 1], completion=[i % 40], x_a=float(i))
        for i in range(count)
    ]


def stored(cache: Cache) -> list[dict[str, Any]]:
    """All rows of all parts."""
    return [row for part in cache.parts() for row in cache.read_part(part)[0].to_pylist()]


def test_a_file_that_grew_adds_what_is_new(cache: Cache) -> None:
    for count in (25, 37, 37, 52):
        before = len(cache.parts())
        report = cache.add_rollouts(grown(count), positions_per_part=10)
        found = stored(cache)
        assert sorted(one["x_a"] for one in found) == list(range(count))
        assert len(cache.parts()) == before + len(report.added)
    again = cache.add_rollouts(pa.Table.from_pylist(grown(52)), positions_per_part=7)
    assert (again.added, sorted(again.present)) == ([], cache.parts())
    samples = {(one["group"], one["sample_index"]) for one in stored(cache)}
    assert len(samples) == 52


def test_default_groups_of_two_imports_differ(cache: Cache) -> None:
    for rows in (grown(9, ids=False), grown(12, ids=False), grown(9)):
        cache.add_rollouts(rows)
    found = [(one["group"], one["sample_index"]) for one in stored(cache)]
    assert len(set(found)) == len(found) == 30
    by_import = [{one["group"] for one in cache.read_part(p)[0].to_pylist()} for p in cache.parts()]
    assert [len(groups) for groups in by_import] == [len({*groups}) for groups in by_import]
    assert sum(map(len, by_import)) == len(set().union(*by_import))


def test_rows_with_and_without_ids_share_no_part(cache: Cache) -> None:
    mixed = [row(i if i % 2 else None, x_a=float(i)) for i in range(6)]
    assert len(cache.add_rollouts(mixed).added) == 2
    assert cache.add_rollouts(mixed).added == []
    report = cache.add_rollouts([*mixed, row(7, x_a=7.0)])
    assert (report.rollouts, len(report.present)) == (1, 2)
    assert len(stored(cache)) == 7


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"completion": [3, 5]}, "completion"),
    ({"prompt": [9]}, "prompt_id, prompt"),
    ({"behaviour_logprob": [-1.0, None]}, "behaviour_logprob"),
    ({"x_a": 1.0}, "x_a"),
    ({"group": 5, "finish_reason": "stop"}, "group, finish_reason"),
    ({"policy_version_min": 0}, "policy_version_min, policy_version_max"),
]


@pytest.mark.parametrize(("change", "columns"), OTHERS)
def test_another_rollout_under_an_id_of_the_cache_is_refused(
    cache: Cache, change: dict[str, Any], columns: str
) -> None:
    (part,) = cache.add_rollouts([row(1), row(2), row(3)]).added
    rows = [row(4), row(3), row(2, **change)]
    reason = f"a rollout_id that {part} holds with another {columns}"
    with pytest.raises(InputError) as caught:
        cache.add_rollouts(rows)
    assert (caught.value.where, caught.value.got) == ("rollouts, row 2", reason)
    assert cache.parts() == [part]
    report = cache.add_rollouts(rows, skip_bad=True)
    assert (report.left_out, report.present, report.rollouts) == ([(2, reason)], [part], 1)


def test_nan_null_and_numbers_left_open_are_the_same_again(cache: Cache) -> None:
    logprob = [float("nan"), None]
    rows = [row("a", behaviour_logprob=logprob, group="g"), row(2**64 - 1, x_a=0.5)]
    (part,) = cache.add_rollouts(rows).added
    assert cache.add_rollouts(rows[::-1]).present == [part]
    without = [{n: v for n, v in one.items() if n != "group"} for one in rows]
    assert cache.add_rollouts(without).present == [part]


def test_ids_that_the_cache_made_are_compared_too(cache: Cache) -> None:
    (part,) = cache.add_rollouts([row(None)]).added
    own = int(cache.rollout_ids(part)[0])
    assert cache.add_rollouts([row(own)]).present == [part]
    with pytest.raises(InputError, match="holds with another completion"):
        cache.add_rollouts([row(own, completion=[1])])


def test_an_id_of_an_earlier_file_is_refused(cache: Cache) -> None:
    files = [checked([row(1), row(2)], "a"), checked([row(3), {}, row(2), row(None)], "b")]
    with pytest.raises(InputError) as caught:
        compare_ids(cache, files, UNKNOWN, skip_bad=False)
    assert caught.value.where == "b, row 1", "rows that were left out before count too"
    first, second = compare_ids(cache, files, UNKNOWN, skip_bad=True)
    assert first.rollouts.left_out == []
    assert second.rollouts.left_out[1] == (2, "a rollout_id that a row of a has, 2")
    assert second.rollouts.number.tolist() == [0, 3]
    assert second.holder.tolist() == ["", ""]
    with pytest.raises(InputError, match=r"b: expected at least one .* got none of 1 rows"):
        compare_ids(cache, [files[0], checked([row(1)], "b")], UNKNOWN, skip_bad=True)


def test_the_same_rollout_of_another_sampler_is_refused(cache: Cache) -> None:
    cache.add_rollouts([row(1), row(2)])
    with pytest.raises(MismatchError, match=r"policy unknown and sampler \{'temperature': 1.0\}"):
        cache.add_rollouts([row(2), row(3)], sampler={"temperature": 1.0})
    assert len(stored(cache)) == 2


def test_no_part_is_read_where_no_row_brings_an_id(cache: Cache, root: Path) -> None:
    (part,) = cache.add_rollouts([row(None)]).added
    path = root / f"rollouts/{part}.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"xxxxxPAR1")
    cache.add_rollouts([row(None, prompt=[5])])
    with pytest.raises(CorruptError, match=part):
        cache.add_rollouts([row(1)])


def test_ids_of_a_part_are_read_alone(cache: Cache) -> None:
    (part,) = cache.add_rollouts([row(i) for i in (5, 2**64 - 1, 0)]).added
    ids = cache.rollout_ids(part)
    assert ids.dtype == np.uint64
    assert ids.tolist() == [5, 2**64 - 1, 0]


def test_a_part_with_a_rollout_that_has_no_id_is_refused() -> None:
    table = pa.table({"rollout_id": pa.array([1, None], pa.uint64())})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: b"{}", HASH_KEY: NO_HASH})
        writer.write_table(table)
    with pytest.raises(CorruptError, match=r"f: .* a rollout without an id"):
        decode_rollout_ids(seal(sink.getvalue()), "f")
    with pytest.raises(CorruptError, match="f: "):
        decode_rollout_ids(sink.getvalue(), "f")
