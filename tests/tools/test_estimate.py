"""`stillroom estimate`: its figures are those of the job that then runs, and it writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.store import Cache
from stillroom.tools.estimate_costs import Requests
from tests.cache.s3 import S3

pytestmark = pytest.mark.usefixtures("quiet_jobs")

ROWS, PARTS = 20, 3


def rows(seed: int, count: int = ROWS) -> list[dict[str, Any]]:
    """Random rollouts; a third of the tokens of one of them count, and one has its own prompt."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = [
        {
            "prompt": rng.integers(0, 250, rng.integers(2, 9)).tolist(),
            "completion": rng.integers(0, 250, rng.integers(3, 40)).tolist(),
        }
        for _ in range(count)
    ]
    made[0]["scored"] = [int(i % 3 == 0) for i in range(len(made[0]["completion"]))]
    made[1]["teacher_prompt"] = rng.integers(0, 250, 30).tolist()
    return made


@pytest.fixture
def flags(tmp_path: Path, teacher_dir: Path, run: Any) -> Callable[..., list[Any]]:
    """Makes a cache with parts that are to be scored; gives the flags of `score`."""

    def make(root: object = tmp_path / "cache", parts: int = PARTS) -> list[Any]:
        flags = ["--root", root, "--teacher.model", teacher_dir, "--teacher.device", "cpu"]
        assert run("init", *flags, "--topk", 8).status == 0
        for seed in range(parts):
            Cache.open(str(root)).add_rollouts(rows(seed), policy_version=0)
        return flags

    return make


def test_the_job_takes_what_it_says(flags: Any, tmp_path: Path, run: Any, tree: Any) -> None:
    given = flags()
    before = tree(tmp_path / "cache")
    found = run("estimate", *given, "--trial-rows", 9, "--json").json()
    assert tree(tmp_path / "cache") == before
    assert run("score", *given).status == 0
    cache = Cache.open(tmp_path / "cache")
    commits = [cache.commit_of(part) for part in cache.parts()]
    work = found["unscored"]
    assert (work["parts"], work["counted_parts"], work["rollouts"]) == (PARTS, PARTS, PARTS * ROWS)
    assert work["positions"] == found["positions"] == sum(commit.positions for commit in commits)
    read = sum(
        commit.tokens + commit.teacher_prompt_tokens - int(commit.row_lengths()[1, 1])
        for commit in commits
    )
    assert work["tokens"] == read
    assert work["longest_tokens"] <= 30 + 39
    assert found["bytes_from"] == "the trial"
    least, likely, most = found["seconds"]
    assert 0 < least <= likely <= most
    assert found["trial"]["rows"] == 9
    assert likely == pytest.approx(read * sorted(found["trial"]["seconds_per_token"])[1])


def test_bytes_are_those_of_the_shards_that_are_there(flags: Any, tmp_path: Path, run: Any) -> None:
    given = flags()
    assert run("score", *given).status == 0
    cache = Cache.open(tmp_path / "cache")
    cache.add_rollouts(rows(9), policy_version=0)
    found = run("estimate", *given, "--trial-rows", 0, "--json").json()
    commits = [cache.commit_of(part) for part in sorted(cache.commits())]
    each = sum(c.stored_bytes for c in commits) / sum(c.positions for c in commits)
    assert found["bytes_per_position"] == pytest.approx(each)
    assert found["stored_bytes"] == pytest.approx(each * found["positions"])
    assert found["seconds"] is found["trial"] is None


def test_parts_that_are_not_read_go_by_their_bytes(flags: Any, run: Any) -> None:
    given = flags(parts=6)
    exact = run("estimate", *given, "--trial-rows", 0, "--json").json()["unscored"]
    about = run("estimate", *given, "--trial-rows", 0, "--count-parts", 2, "--json").json()
    work = about["unscored"]
    assert (work["parts"], work["counted_parts"]) == (6, 2)
    assert work["positions"] == pytest.approx(exact["positions"], rel=0.3)
    assert "2 of the parts were read" in run("estimate", *given, "--count-parts", 2).out


def test_a_planned_rollout_is_counted_until_it_is_sampled(
    flags: Any, tmp_path: Path, student_dir: Path, prompts_file: Path, run: Any
) -> None:
    given, plan = flags(parts=0), tmp_path / "rollout.yaml"
    plan.write_text(
        f"root: {tmp_path / 'cache'}\nstudent: {student_dir}\nprompts: {{source: {prompts_file}}}\n"
        "sampler: {max_new_tokens: 5, samples_per_prompt: 2, device: cpu}\n"
        "refresh: {prompts_per_cycle: 6, unit_rollouts: 4}\n"
    )
    found = run("estimate", *given, "--rollout", plan, "--trial-rows", 4, "--json").json()
    planned = found["planned"]
    assert (planned["parts"], planned["rollouts"], planned["positions"]) == (3, 12, 60)
    assert found["positions"] == 60
    assert found["trial_on"].startswith("the prompts")
    assert run("rollout", plan).status == 0
    found = run("estimate", *given, "--rollout", plan, "--trial-rows", 0, "--json").json()
    assert found["planned"]["parts"] == 0
    assert (found["unscored"]["parts"], found["unscored"]["rollouts"]) == (3, 12)
    assert found["unscored"]["tokens"] <= planned["tokens"]


def test_before_there_is_a_cache(
    tmp_path: Path, teacher_dir: Path, prompts_file: Path, run: Any
) -> None:
    plan = tmp_path / "rollout.yaml"
    plan.write_text(
        f"root: r\nprompts: {{source: {prompts_file}}}\nsampler: {{max_new_tokens: 5}}\n"
    )
    given = ["--root", tmp_path / "none", "--teacher.model", teacher_dir, "--rollout", plan]
    ran = run("estimate", *given, "--topk", 4, "--trial-rows", 4)
    assert ran.status == 0, ran.err
    assert "12 rollouts, 3,072 positions" not in ran.out
    assert "12 rollouts, 60 positions" in ran.out
    assert "the prompts, which are shorter than rollouts" in ran.out
    assert not (tmp_path / "none").exists()
    assert "not known without" in run("estimate", *given, "--trial-rows", 0).out


def test_requests_to_an_object_store(s3: S3, flags: Any, run: Any) -> None:
    root = s3.new_root()
    given = flags(root, parts=5)
    found = run("estimate", *given, "--json").json()
    said = Requests(**found["requests"])
    s3.proxy.behave()
    assert run("score", *given).status == 0
    lists = s3.proxy.count("GET", "list-type")
    writes, reads = s3.proxy.count("PUT"), s3.proxy.count("GET") - lists + s3.proxy.count("HEAD")
    assert writes <= said.writes <= writes + 2
    assert reads <= said.reads <= reads + 3
    assert lists <= said.lists <= lists + 2
    assert s3.proxy.count("DELETE") == 0


def test_another_teacher_is_refused(flags: Any, student_dir: Path, run: Any) -> None:
    given = flags()
    ran = run("estimate", *given, "--teacher.model", student_dir)
    assert ran.status == 2
    assert "teacher.fingerprint" in ran.err
    assert run("estimate", *given, "--topk", 9).status == 2


def test_numbers_out_of_range_are_refused(flags: Any, run: Any) -> None:
    given = flags(parts=1)
    assert "trial_rows" in run("estimate", *given, "--trial-rows", -1).err
    assert run("estimate", *given, "--count-parts", 0).status == 2


def test_nothing_to_score(flags: Any, run: Any) -> None:
    given = flags(parts=1)
    assert run("score", *given).status == 0
    ran = run("estimate", *given)
    assert ran.status == 0, ran.err
    assert "to be scored: 0 parts" in ran.out
    assert "rollouts that are scored already" in ran.out
