"""Rollouts from elsewhere become parts: the same parts every time, whole, or none at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache.errors import ConfigError, InputError, MismatchError, ShapeError
from stillroom.cache.part import rollout_id
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher, make_identity

ROW = {"prompt": [1, 2], "completion": [3, 4]}


def many_rows(count: int) -> list[dict[str, Any]]:
    """Rollouts of 1 to 6 tokens, some not scored, of 10 prompts."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        n = int(rng.integers(1, 7))
        mask = [1, *rng.integers(0, 2, n - 1).tolist()]
        rows.append(
            {
                "prompt": [i % 10, 1],
                "completion": rng.integers(0, 40, n).tolist(),
                "scored": mask if i % 2 else None,
                "behaviour_logprob": (-rng.random(n)).tolist() if i % 3 else None,
                "x_reward": float(i),
            }
        )
    return rows


def stored(cache: Cache) -> list[dict[str, Any]]:
    """All rows of all parts, by their reward."""
    rows = [row for part in cache.parts() for row in cache.read_part(part)[0].to_pylist()]
    return sorted(rows, key=lambda row: row["x_reward"])


def test_the_same_rollouts_add_nothing(cache: Cache, root: Path) -> None:
    rows = many_rows(50)
    first = cache.add_rollouts(rows, positions_per_part=30)
    assert len(first.added) == len(cache.parts()) > 3
    files = {path: path.read_bytes() for path in root.rglob("*.parquet")}
    again = cache.add_rollouts(pa.Table.from_pylist(rows), positions_per_part=30)
    assert (again.added, again.present) == ([], first.added)
    assert (again.rollouts, again.positions) == (0, 0)
    assert {path: path.read_bytes() for path in root.rglob("*.parquet")} == files


def test_names_of_parts_are_pinned(cache: Cache) -> None:
    """Rollouts that were imported once must be known again by every later release."""
    assert cache.add_rollouts([ROW]).added == ["v000000-4f479d63388bc18a"]
    report = cache.add_rollouts([ROW | {"x_a": 1}], policy_version=12)
    assert report.added == ["v000012-f6df1c7939a33179"]


def test_rows_come_back_with_what_they_left_open(cache: Cache) -> None:
    rows = many_rows(50)
    report = cache.add_rollouts(rows, positions_per_part=30)
    found = stored(cache)
    for given, row in zip(rows, found, strict=True):
        logprob = given["behaviour_logprob"]
        expected = None if logprob is None else np.array(logprob, np.float32).tolist()
        assert row == row | given | {"behaviour_logprob": expected}
        assert (row["source"], row["policy_version_min"]) == ("import", -1)
    assert len({row["rollout_id"] for row in found}) == 50
    samples = [(row["group"], row["sample_index"]) for row in found]
    assert len(set(samples)) == 50
    assert {index for _, index in samples} == set(range(5)), "counted over the parts"
    scored = [sum(row["scored"] or [1] * len(row["completion"])) for row in rows]
    assert (report.rollouts, report.positions) == (50, sum(scored))
    part = cache.parts()[0]
    table, meta, _ = cache.read_part(part)
    assert (meta.policy_version, meta.sampler) == (0, {"temperature": None})
    assert table["rollout_id"].to_pylist() == [rollout_id(meta.unit, i) for i in range(len(table))]


def test_parts_hold_about_as_many_positions_as_asked(cache: Cache) -> None:
    report = cache.add_rollouts(many_rows(200), positions_per_part=50)
    sizes = []
    for part in report.added:
        table, _, _ = cache.read_part(part)
        masks = zip(table["scored"].to_pylist(), table["completion"].to_pylist(), strict=True)
        sizes.append(sum(sum(mask or [1] * len(tokens)) for mask, tokens in masks))
    assert sum(sizes) == report.positions
    assert all(50 - 6 < size < 50 + 6 for size in sizes[:-1])
    assert 0 < sizes[-1] < 50 + 6


def test_a_row_longer_than_a_part_is_a_part_of_its_own(cache: Cache) -> None:
    rows = [ROW | {"completion": [3] * n} for n in (1, 9, 1, 1)]
    report = cache.add_rollouts(rows, positions_per_part=2)
    assert [len(cache.read_part(part)[0]) for part in report.added] == [2, 2]


def test_equal_parts_of_one_import_are_all_kept(cache: Cache) -> None:
    rows = [ROW] * 6
    report = cache.add_rollouts(rows, positions_per_part=4)
    assert len(set(report.added)) == 3
    assert cache.add_rollouts(rows, positions_per_part=4).present == report.added
    ids = [i for part in report.added for i in cache.read_part(part)[0]["rollout_id"].to_pylist()]
    assert len(set(ids)) == 6


def test_what_is_known_of_the_sampling_is_recorded(cache: Cache) -> None:
    sampler = {"temperature": 0.7, "top_p": 0.9}
    (part,) = cache.add_rollouts([ROW], policy_version=3, sampler=sampler).added
    table, meta, _ = cache.read_part(part)
    assert (meta.policy_version, meta.sampler) == (3, sampler)
    assert part.startswith("v000003-")
    assert table["policy_version_min"].to_pylist() == [3]


def test_the_same_rollouts_with_other_claims_are_refused(cache: Cache) -> None:
    cache.add_rollouts([ROW], policy_version=3)
    others: list[dict[str, Any]] = [{"policy_version": 4}, {"policy_version": None}]
    others.append({"policy_version": 3, "sampler": {"temperature": 1.0}})
    for other in others:
        with pytest.raises(MismatchError, match="holds the same rollouts"):
            cache.add_rollouts([ROW, ROW | {"prompt": [9]}], **other, positions_per_part=2)
    assert len(cache.parts()) == 1


@pytest.mark.parametrize(("first", "second"), [(None, 0), (0, None)])
def test_an_unknown_policy_is_not_policy_0(
    cache: Cache, first: int | None, second: int | None
) -> None:
    cache.add_rollouts([ROW], policy_version=first)
    said = ["unknown" if policy is None else "0" for policy in (first, second)]
    with pytest.raises(MismatchError, match="policy {} and .* got policy {} and".format(*said)):
        cache.add_rollouts([ROW], policy_version=second)
    own = [ROW | {"policy_version_min": 4}]
    cache.add_rollouts(own, policy_version=first)
    assert len(cache.add_rollouts(own, policy_version=second).present) == 1, "rows say it"


def test_what_was_retired_is_not_added_again(cache: Cache, root: Path) -> None:
    (part,) = cache.add_rollouts([ROW]).added
    cache.retire(part, "too old")
    (root / f"rollouts/{part}.parquet").unlink()
    assert cache.add_rollouts([ROW]).present == [part]
    assert cache.parts() == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"completion": []}, InputError),
        ({"completion": [99]}, InputError),
        ({"completion": "text"}, InputError),
        ({"reward": 1.0}, ShapeError),
    ],
)
def test_one_bad_row_and_nothing_is_written(
    cache: Cache, root: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    before = sorted(root.rglob("*"))
    with pytest.raises(error):
        cache.add_rollouts([*many_rows(50), ROW | change], positions_per_part=30)
    assert sorted(root.rglob("*")) == before


def test_bad_rows_are_left_out_on_request(cache: Cache) -> None:
    rows = [ROW, ROW | {"completion": []}, ROW]
    report = cache.add_rollouts(rows, skip_bad=True)
    assert report.left_out == [(1, "an empty completion")]
    assert (report.rollouts, report.positions) == (2, 4)
    assert cache.add_rollouts([ROW, ROW]).present == report.added, "they alone name the part"


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_version": -1},
        {"policy_version": 10**9},
        {"positions_per_part": 0},
        {"sampler": {"temperature": 0.0}},
        {"sampler": {"temperature": float("nan")}},
        {"sampler": {"temperature": "0.7"}},
        {"sampler": {"temperature": 1.0, "top_p": np.float32(0.5)}},
        {"sampler": {"temperature": 1.0, "top_p": float("inf")}},
    ],
)
def test_settings_are_checked(cache: Cache, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        cache.add_rollouts([ROW], **settings)
    assert cache.parts() == []


def test_turns_tools_and_a_prompt_of_the_teacher_s_reach_the_teacher(cache: Cache) -> None:
    turns = {
        "token": [1, 2, 3, 4, 9, 9, 5, 6],
        "scored": [0, 0, 1, 1, 0, 0, 1, 1],
        "teacher_prompt": [7, 8, 1, 2],
        "behaviour_logprob": [None, None, -0.1, -0.2, None, None, -0.3, -0.4],
    }
    (part,) = cache.add_rollouts([turns]).added
    teacher = FakeTeacher()
    score(cache, teacher)
    assert [7, 8, 1, 2, 3, 4, 9, 9, 5, 6] in teacher.read
    arrays = cache.read(part)
    assert arrays["token"].tolist() == turns["token"]
    assert arrays["scored"].tolist() == turns["scored"]
    expected = np.array([-0.1, -0.2, -0.3, -0.4], np.float32)
    np.testing.assert_array_equal(arrays["behaviour_logprob"], expected)
    logit = teacher.logit_VV[[2, 3, 9, 5], [3, 4, 5, 6]]
    total = np.log(np.exp(teacher.logit_VV[[2, 3, 9, 5]]).sum(1))
    np.testing.assert_allclose(arrays["sampled_logprob"], logit - total, rtol=1e-5)


CHILD = """
import sys
from stillroom.cache.store import Cache
from tests.cache.test_add_rollouts import many_rows
print("ready", flush=True)
Cache.open(sys.argv[1]).add_rollouts(many_rows(150), positions_per_part=10)
"""


@pytest.mark.dist
def test_a_killed_import_is_completed_by_the_next(cache: Cache, root: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(cache.parts()) < 5 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    whole = Cache.create(tmp_path / "whole", make_identity())
    expected = whole.add_rollouts(many_rows(150), positions_per_part=10)
    killed_at = cache.parts()
    assert 5 <= len(killed_at) < len(expected.added)
    report = cache.add_rollouts(many_rows(150), positions_per_part=10)
    assert sorted(report.present) == killed_at
    assert stored(cache) == stored(whole)
    assert cache.parts() == whole.parts()
