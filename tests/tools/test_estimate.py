"""`stillroom estimate`: its figures are those of the job that then runs, and it writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.tools.estimate_costs import Requests
from stillroom.tools.estimate_work import count_planned
from stillroom.tools.jobs import RolloutJob
from stillroom.train.settings import load_yaml
from tests.cache.s3 import S3
from tests.vocabularies import reordered

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
        f"root: {tmp_path}/./none\nprompts: {{source: {prompts_file}}}\n"
        "sampler: {max_new_tokens: 5}\n"
    )
    given = ["--root", tmp_path / "none", "--teacher.model", teacher_dir, "--rollout", plan]
    ran = run("estimate", *given, "--topk", 4, "--trial-rows", 4)
    assert ran.status == 0, ran.err
    assert "12 rollouts, 3,072 positions" not in ran.out
    assert "12 rollouts, 60 positions" in ran.out
    assert "the prompts, which are shorter than rollouts" in ran.out
    assert not (tmp_path / "none").exists()
    assert "not known without" in run("estimate", *given, "--trial-rows", 0).out
    ran = run("estimate", *given[:4])
    assert (ran.status, "none/cache.json: expected a cache" in ran.err) == (2, True), ran.err


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


def test_the_part_to_score_again_is_counted(flags: Any, tmp_path: Path, run: Any) -> None:
    given = flags(parts=2)
    first, second = Cache.open(tmp_path / "cache").parts()
    assert run("estimate", *given, "--again", first).status == 2, "it is not scored"
    assert run("score", *given).status == 0
    Cache.open(tmp_path / "cache").add_rollouts(rows(9), policy_version=0)
    found = run("estimate", *given, "--again", first, "--trial-rows", 0, "--json").json()
    assert (found["unscored"]["parts"], found["unscored"]["rollouts"]) == (2, 2 * ROWS)
    assert second not in Cache.open(tmp_path / "cache").unscored()


def test_how_score_runs_is_for_its_file_alone(flags: Any, tmp_path: Path, run: Any) -> None:
    given, settings = flags(parts=1), tmp_path / "score.yaml"
    settings.write_text(
        f"root: {given[1]}\nteacher: {{model: {given[3]}, device: cpu}}\nengine: ray\n"
        "ray: {workers: [1, 2]}\naccept_numerics: true\nwatch_s: 5\n"
    )
    assert run("estimate", settings, "--trial-rows", 0).status == 0
    for flag in (["--watch"], ["--engine", "ray"], ["--rank", 0], ["--ray.num-gpus", 1]):
        assert run("estimate", settings, *flag).status == 2


def plan_of(root: Path, prompts: Path, student: Path | None = None, samples: int = 2) -> str:
    """Settings of a rollout job."""
    named = "" if student is None else f"student: {student}\n"
    return (
        f"root: {root}\n{named}prompts: {{source: {prompts}}}\n"
        f"sampler: {{max_new_tokens: 5, samples_per_prompt: {samples}, device: cpu}}\n"
        "refresh: {prompts_per_cycle: 6, unit_rollouts: 4}\n"
    )


def test_a_stored_plan_has_its_own_settings(
    flags: Any, tmp_path: Path, student_dir: Path, prompts_file: Path, run: Any
) -> None:
    given, plan = flags(parts=0), tmp_path / "rollout.yaml"
    plan.write_text(plan_of(tmp_path / "cache", prompts_file, student_dir))
    assert run("rollout", plan).status == 0
    cache = Cache.open(tmp_path / "cache")
    for part in cache.parts():
        cache.storage.delete(f"rollouts/{part}.parquet")
    plan.write_text(plan_of(tmp_path / "cache", prompts_file, samples=7))
    found = run("estimate", *given, "--rollout", plan, "--trial-rows", 0, "--json").json()
    assert (found["planned"]["rollouts"], found["planned"]["positions"]) == (12, 60)
    plan.write_text(plan_of(tmp_path / "other", prompts_file))
    ran = run("estimate", *given, "--rollout", plan)
    assert (ran.status, "rollout.yaml, key 'root': expected" in ran.err) == (2, True)


def test_the_student_renders_the_prompts(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path, run: Any
) -> None:
    """Its ids are others than the teacher's, and it need not be named: it is policy 0."""
    other = tmp_path / "other"
    reordered(teacher_dir, other, more=["m1", "m2"])
    teacher = ["--root", tmp_path / "cache", "--teacher.model", other, "--teacher.device", "cpu"]
    plan = tmp_path / "rollout.yaml"
    plan.write_text(plan_of(tmp_path / "cache", prompts_file, student_dir))
    ran = run("estimate", *teacher, "--rollout", plan)
    assert (ran.status, "init --student" in ran.err) == (2, True)
    assert run("init", *teacher, "--student", student_dir, "--topk", 8).status == 0
    plan.write_text(plan_of(tmp_path / "cache", prompts_file))
    cache = Cache.open(tmp_path / "cache")
    job = load_yaml(RolloutJob, str(plan))
    _, prompts = count_planned(cache, cache.identity, job, inspect_model(str(other)))
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(student_dir).decode(prompts[0].tolist())
    assert "count 0: abc" in text
    assert run("estimate", *teacher, "--rollout", plan, "--trial-rows", 3).status == 0
    cache.storage.delete("policies/000000.json")
    ran = run("estimate", *teacher, "--rollout", plan)
    assert (ran.status, "expected a student; got none" in ran.err) == (2, True)
