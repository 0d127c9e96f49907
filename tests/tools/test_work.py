"""The jobs one after another on tiny models, each run twice: nothing is done twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import MissingError
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_versions, read_policy, record_unkept
from stillroom.train.run_config import RunConfig

pytestmark = pytest.mark.usefixtures("quiet_jobs")


@pytest.fixture
def flags(tmp_path: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path) -> Any:
    """Flags of every job on one root."""
    root = ["--root", tmp_path / "cache"]
    teacher = ["--teacher.model", teacher_dir, "--teacher.device", "cpu"]
    sample = ["--prompts.source", prompts_file, "--sampler.max-new-tokens", 5]
    sample += ["--sampler.device", "cpu", "--refresh.prompts-per-cycle", 6]
    sample += ["--refresh.unit-rollouts", 4, "--refresh.max-lag", 0]
    train = ["--output", tmp_path / "out", "--run-name", "tiny", "--train.device", "cpu"]
    train += ["--train.replay.batch-rows", 4]
    return {
        "init": [*root, *teacher, "--topk", 8],
        "rollout": [*root, *sample],
        "refresh": [*root, *sample],
        "score": [*root, *teacher],
        "train": [*root, *train],
        "first": ["--student", student_dir],
    }


def test_jobs_with_a_cut_and_ids_of_the_student(flags: Any, tmp_path: Path, run: Any) -> None:
    """What the sampler notes is scored, and a trainer reads entries that were cut."""
    root = tmp_path / "cache"
    kept = ["--mass", 0.5, "--extra", 3, "--extra-kind", "student"]
    assert "8 of 262 tokens that cover 0.5 and 3 ids of" in run("init", *flags["init"], *kept).out
    noted = [*flags["rollout"], *flags["first"], "--sampler.extra", 2]
    for command, own in (("rollout", noted), ("score", flags["score"]), ("train", flags["train"])):
        ran = run(command, *own)
        assert ran.status == 0, ran.err
    cache = Cache.open(root)
    arrays = cache.shard(cache.commit_of(cache.parts()[0])).all_rows()
    assert arrays["topk_count"].min() < 8
    assert (arrays["extra_id"][:, :2] < 262).all()
    assert (arrays["extra_id"][:, 2] == UNUSED_ID).all()
    assert (np.diff(arrays["extra_behaviour_logprob"][:, :2]) <= 0).all(), "likeliest first"
    assert run("verify", root, "--deep").status == 0


def test_jobs_one_after_another(
    flags: Any, tmp_path: Path, student_dir: Path, run: Any, tree: Any
) -> None:
    root = tmp_path / "cache"

    def done(command: str, *more: object) -> str:
        ran = run(command, *flags[command], *more)
        assert ran.status == 0, ran.err
        return str(ran.out)

    assert "top 8 of 262 tokens" in done("init")
    out = done("rollout", *flags["first"])
    assert "6 of 12 are planned for policy 0" in out
    assert "2 of 2 parts added, 6 rollouts" in out
    assert "2 parts," in done("score")

    before = tree(root)
    assert "was there" in done("init", *flags["first"])
    assert "0 of 2 parts added" in done("rollout")
    assert "nothing to do, 2 parts are scored" in done("score")
    assert tree(root) == before

    out = done("train")
    assert "2 steps, 6 rollouts" in out
    assert "policy 0 -> 1, policies/v000001-" in out
    assert policy_versions(Cache.open(root).storage) == [0, 1]
    assert (tmp_path / "out" / "tiny-000000.json").is_file()
    assert Cache.open(root).storage.list("pins") == []

    out = done("refresh")
    assert "2 parts retired" in out
    assert "2 of 2 parts added" in out
    before = tree(root)
    assert "0 parts retired" in done("refresh")
    assert tree(root) == before
    done("score")

    cache = Cache.open(root)
    assert {commit.policy_version for commit in cache.snapshot().commits} == {1}
    assert sorted(part[:7] for part in cache.commits()) == ["v000000"] * 2 + ["v000001"] * 2
    assert run("verify", root).status == 0
    assert len(run("status", root, "--json").json()["policies"]) == 2


def test_teacher_may_lie_elsewhere(
    flags: Any, teacher_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("init", *flags["init"]).status == 0
    monkeypatch.chdir(teacher_dir.parent)
    assert run("score", *flags["score"][:2], "--teacher.model", f"./{teacher_dir.name}").status == 0
    relative = ["--teacher.model", f"./{teacher_dir.name}", "--topk", 8]
    assert run("init", *flags["init"][:2], *relative).status == 0


def test_settings_of_a_stored_plan_hold(flags: Any, tmp_path: Path, run: Any, tree: Any) -> None:
    assert run("init", *flags["init"], *flags["first"]).status == 0
    assert run("rollout", *flags["rollout"]).status == 0
    before = tree(tmp_path / "cache")
    changes: list[tuple[str, float]] = [("--sampler.temperature", 0.5), ("--refresh.seed", 1)]
    for change in changes:
        for command in ("rollout", "refresh"):
            ran = run(command, *flags[command], *change)
            assert ran.status == 2
            assert change[0].split(".")[1] in ran.err
    assert tree(tmp_path / "cache") == before


def test_run_hands_its_settings_to_the_pipeline(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakePipeline:
        def __init__(self, config: RunConfig) -> None:
            seen.append(config)

        def run(self) -> None:
            seen.append("run")

    seen: list[Any] = []
    monkeypatch.setattr("stillroom.train.pipeline.Pipeline", FakePipeline)
    models = ["--student", "s", "--teacher.model", "t"]
    prompts = ["--prompts.source", "p", "--held-out.source", "h"]
    assert run("run", "--root", "r", "--output", "o", *models, *prompts, "--rounds", 3).status == 0
    assert (seen[0].rounds, seen[0].held_out.source, seen[1]) == (3, "h", "run")


def test_yaml_file_of_a_job(flags: Any, tmp_path: Path, teacher_dir: Path, run: Any) -> None:
    path = tmp_path / "init.yaml"
    path.write_text(f"root: {tmp_path / 'other'}\nteacher:\n  model: {teacher_dir}\ntopk: 4\n")
    assert "top 3 of" in run("init", path, "--topk", 3).out
    ran = run("init", path)
    assert ran.status == 2
    assert "topk = 3" in ran.err
    assert "topk = 4" in ran.err


def no_teacher(*_: object) -> None:
    """A teacher that does not load."""
    raise MissingError("the teacher", "a package", "none", "Install it.")


def test_a_damaged_part_is_scored_again(
    flags: Any, tmp_path: Path, student_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    for command in ("init", "rollout", "score"):
        more = flags["first"] if command == "rollout" else []
        assert run(command, *flags[command], *more).status == 0
    part = Cache.open(root).parts()[0]
    damaged = next((root / "scores" / part).rglob("shard.zarr.zip"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 1
    damaged.write_bytes(data)
    assert run("verify", root).status == 1
    with monkeypatch.context() as broken:
        broken.setattr("stillroom.tools.scoring.load_teacher", no_teacher)
        assert run("score", *flags["score"], "--again", part).status == 2
    assert Cache.open(root).commits()[part] == 0, "it is set aside once a teacher is there"
    ran = run("score", *flags["score"], "--again", "v000000-0000000000000000")
    assert ran.status == 2
    assert "v000000-0000000000000000: expected a commit" in ran.err
    assert "1 parts," in run("score", *flags["score"], "--again", part).out
    assert Cache.open(root).commits()[part] == 1
    cache = Cache.open(root)
    assert len(cache.read(part)["token"]) == cache.commit_of(part).tokens
    assert damaged.is_file()


def test_a_student_may_lie_elsewhere(
    flags: Any, tmp_path: Path, student_dir: Path, run: Any
) -> None:
    first, second = tmp_path / "here", tmp_path / "there"
    shutil.copytree(student_dir, first)
    assert run("init", *flags["init"], "--student", first).status == 0
    first.rename(second)
    ran = run("rollout", *flags["rollout"])
    assert ran.status == 2
    assert "--student" in ran.err
    for command in ("rollout", "score", "train"):
        more = [] if command == "score" else ["--student", second]
        ran = run(command, *flags[command], *more)
        assert ran.status == 0, ran.err
    assert policy_versions(Cache.open(tmp_path / "cache").storage) == [0, 1]


def test_students_whose_weights_nobody_kept_are_passed_over(
    flags: Any, tmp_path: Path, run: Any
) -> None:
    """As a run leaves them that refreshed its cache in the middle and published nothing."""
    storage = Storage(tmp_path / "cache")
    for command in ("init", "rollout", "score", "rollout", "train", "refresh"):
        more = flags["first"] if command == "init" else []
        ran = run(command, *flags[command], *more)
        assert ran.status == 0, ran.err
        if command == "score":
            for parent in (0, 1):
                record_unkept(storage, run="refreshing", parent=parent, step=4)
        elif policy_versions(storage)[-1] == 2:
            assert "policy 0 is the newest with weights: later ones, up to 2, have none" in ran.out
    assert policy_versions(storage) == [0, 1, 2, 3]
    published = read_policy(storage, 3)
    assert (published.parent, published.path is None) == (0, False)
    record = json.loads((tmp_path / "out" / "tiny-000000.json").read_bytes())
    assert record["published"]["version"] == 3
    assert {part[:7] for part in Cache.open(tmp_path / "cache").unscored()} == {"v000003"}


def test_a_root_that_no_student_can_be_published_into_is_refused_at_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "open", lambda *_: pytest.fail("the root was asked for something"))
    where = ("--root", "s3://bucket/cache", "--output", str(tmp_path / "out"))
    ran = run("train", *where, "--run-name", "a")
    assert ran.status != 0
    assert "expected a folder to publish weights in; got an object store" in ran.err
    assert not (tmp_path / "out").exists()
