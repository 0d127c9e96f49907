"""Inputs that cannot be used: exit status 2, one line that says why, and not a byte written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("quiet_jobs")


class World:
    """Folders to break, and flags for them.

    Args:
        folder: where everything lies.
        teacher: a sound teacher.
        student: a sound student.
        prompts: a file of prompts.
    """

    def __init__(self, folder: Path, teacher: Path, student: Path, prompts: Path) -> None:
        """Copy what a test may break."""
        self.folder, self.root = folder, folder / "cache"
        self.teacher, self.student, self.prompts = teacher, student, prompts

    def flags(self, command: str) -> list[Any]:
        """Flags of a command that would succeed."""
        root = ["--root", self.root]
        teacher = ["--teacher.model", self.teacher, "--teacher.device", "cpu"]
        sample = ["--prompts.source", self.prompts, "--sampler.max-new-tokens", 4]
        student = ["--student", self.student]
        output = ["--output", self.folder / "out"]
        run = ["--held-out.source", self.prompts, "--rounds", 1, "--topk", 8]
        return {
            "init": [*root, *teacher, *student, "--topk", 8],
            "rollout": [*root, *sample, *student],
            "refresh": [*root, *sample],
            "score": [*root, *teacher],
            "train": [*root, *output, "--run-name", "r", "--train.device", "cpu"],
            "run": [*root, *output, *teacher, *student, *sample, *run],
        }[command]

    def copy(self, model: Path, name: str) -> Path:
        """A copy of a model folder, to be broken."""
        return shutil.copytree(model, self.folder / name)

    def prompt_rows(self, *rows: dict[str, Any]) -> None:
        """Take these rows as prompts."""
        self.prompts = self.folder / "p.jsonl"
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(tmp_path: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path) -> World:
    """Sound inputs, and no cache yet."""
    return World(tmp_path, teacher_dir, student_dir, prompts_file)


@pytest.fixture
def refused(world: World, run: Any, tree: Any) -> Any:
    """Runs a command that must be refused without writing; returns its message."""

    def check(command: str, *more: object) -> str:
        before = tree(world.folder)
        ran = run(command, *world.flags(command), *more)
        assert ran.status == 2
        assert tree(world.folder) == before
        assert ran.err.startswith("stillroom: error: ")
        assert ran.err.count("\n") == 1
        return str(ran.err)

    return check


@pytest.mark.parametrize("command", ["rollout", "refresh", "score", "train"])
def test_missing_cache(command: str, refused: Any) -> None:
    assert "no cache.json" in refused(command)


def test_unknown_yaml_key(world: World, run: Any) -> None:
    path = world.folder / "job.yaml"
    path.write_text("root: r\nsampler: {max_new_token: 3}\n")
    ran = run("rollout", path)
    assert ran.status == 2
    assert "Did you mean 'max_new_tokens'?" in ran.err


def test_other_topk_temperature_or_teacher(world: World, run: Any, refused: Any) -> None:
    assert run("init", *world.flags("init")).status == 0
    assert run("rollout", *world.flags("rollout")).status == 0
    assert "topk = 8; got topk = 9" in refused("score", "--topk", 9)
    assert "temperature = 1.0; got temperature = 0.5" in refused("score", "--temperature", 0.5)
    assert "teacher.compute_dtype" in refused("score", "--teacher.dtype", "bfloat16")
    assert "mass = 1.0; got mass = 0.9" in refused("score", "--mass", 0.9)
    tail = ("--extra", 2, "--extra-kind", "tail")
    assert "extra = 0, extra_kind = 'none'; got extra = 2, " in refused("score", *tail)
    assert "topk = 8; got topk = 9" in refused("init", "--topk", 9)
    assert "mass = 1.0; got mass = 0.9" in refused("init", "--mass", 0.9)
    assert "teacher.fingerprint" in refused("score", "--teacher.model", world.student)


@pytest.mark.parametrize("command", ["init", "run"])
def test_a_mass_that_is_no_probability(command: str, refused: Any) -> None:
    assert "mass: expected a probability above 0; got 1.5" in refused(command, "--mass", 1.5)


@pytest.mark.parametrize("command", ["init", "run"])
def test_topk_beyond_the_vocabulary(command: str, refused: Any) -> None:
    assert "1 to 262" in refused(command, "--topk", 263)


def test_root_that_cannot_be_written(world: World, refused: Any) -> None:
    (world.folder / "file").write_text("x")
    world.root = world.folder / "file" / "cache"
    assert "must know hard links" in refused("init")


@pytest.mark.parametrize("command", ["rollout", "run"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "an empty file"),
        ([{"question": "why?"}], "a column messages or prompt or text"),
        ([{"prompt": "  "}], "an empty one"),
        ([{"prompt": "x" * 300}], "leaves room"),
    ],
)
def test_prompts(
    command: str, rows: list[dict[str, Any]], message: str, world: World, run: Any, refused: Any
) -> None:
    if command == "rollout":
        assert run("init", *world.flags("init")).status == 0
    world.prompt_rows(*rows)
    assert message in refused(command)


@pytest.mark.parametrize("command", ["rollout", "run"])
def test_no_room_for_any_prompt(command: str, world: World, run: Any, refused: Any) -> None:
    assert run("init", *world.flags("init")[:-2], "--topk", 8).status == 0
    assert "room for a prompt" in refused(command, "--sampler.max-new-tokens", 256)


def test_teacher_with_less_room_than_the_student(
    world: World, teacher_dir: Path, run: Any, refused: Any
) -> None:
    world.teacher = world.copy(teacher_dir, "short")
    path = world.teacher / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8}))
    assert run("init", *world.flags("init")).status == 0
    assert "leaves room" in refused("rollout")


def test_messages_and_a_student_without_a_chat_template(
    world: World, student_dir: Path, run: Any, refused: Any
) -> None:
    world.student = world.copy(student_dir, "plain")
    (world.student / "chat_template.jinja").unlink()
    assert run("init", *world.flags("init")).status == 0
    world.prompt_rows({"messages": [{"role": "user", "content": "why?"}]})
    assert "the tokenizer has no chat template" in refused("rollout")


def test_rollouts_that_are_longer_than_the_teacher_reads(
    world: World, run: Any, refused: Any
) -> None:
    """A part holds only what can be scored: the score job never meets such a row."""
    assert run("init", *world.flags("init")).status == 0
    path = world.folder / "rollouts.jsonl"
    rows = [{"prompt": [1, 2], "completion": [3] * size} for size in (5, 300, 254, 255)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    root, taken = world.root, ["--rollouts", path]
    ran = run("import", root, *taken)
    assert ran.status == 2
    assert "302 tokens; the teacher reads 256 (and 1 more such rows)" in ran.err
    assert not (root / "rollouts").exists()
    ran = run("import", root, *taken, "--skip-bad", world.folder / "bad.jsonl")
    assert ran.status == 0, ran.err
    assert len((world.folder / "bad.jsonl").read_text().splitlines()) == 2
    assert run("score", *world.flags("score")).status == 0


def test_a_teacher_that_does_not_fit_into_memory(
    world: World, run: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("init", *world.flags("init")).status == 0
    assert run("rollout", *world.flags("rollout")).status == 0
    monkeypatch.setattr("stillroom.cache.model_memory.free_bytes", lambda: 1000)
    message = refused("score")
    assert "weights that fit into the 0.0 GB that are free in main memory" in message


@pytest.mark.parametrize("command", ["init", "run"])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_model_that_predicts_no_next_token(
    command: str, which: str, world: World, refused: Any
) -> None:
    folder = world.copy(getattr(world, which), "encoder")
    path = folder / "config.json"
    settings = {"architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    setattr(world, which, folder)
    assert "expected a causal language model; got BertForMaskedLM" in refused(command)


def halve_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def halve_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("command", ["init", "run"])
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize(
    "damage", [halve_weights, drop_weights, halve_config, shutil.rmtree], ids=lambda f: f.__name__
)
def test_unfinished_checkpoint(
    command: str, which: str, damage: Callable[[Path], None], world: World, refused: Any
) -> None:
    folder = world.copy(getattr(world, which), "broken")
    damage(folder)
    setattr(world, which, folder)
    assert str(folder) in refused(command)


def test_policy_that_was_changed(world: World, student_dir: Path, run: Any, refused: Any) -> None:
    world.student = world.copy(student_dir, "mine")
    assert run("init", *world.flags("init")).status == 0
    halve_weights(world.student)
    assert "half written" in refused("refresh")
    drop_weights(world.student)
    assert "model.safetensors" in refused("refresh")


def other_vocabulary(folder: Path) -> None:
    """Give a model's tokenizer one token more."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    extra = dict(value["added_tokens"][-1]) | {"id": 262, "content": "<|more|>"}
    value["added_tokens"].append(extra)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("command", ["init", "rollout", "run"])
def test_student_with_another_vocabulary(
    command: str, world: World, student_dir: Path, run: Any, refused: Any
) -> None:
    if command == "rollout":
        no_student = ["--root", world.root, "--teacher.model", world.teacher, "--topk", 8]
        assert run("init", *no_student).status == 0
    world.student = world.copy(student_dir, "other")
    other_vocabulary(world.student)
    said = {"init": "got 1 of its 263 tokens without a partner, such as"}
    assert said.get(command, "262 tokens; got 263 tokens") in refused(command)


def test_another_initial_student(world: World, teacher_dir: Path, run: Any, refused: Any) -> None:
    assert run("init", *world.flags("init")).status == 0
    assert "the student" in refused("rollout", "--student", teacher_dir)
    assert "policy 3" in refused("rollout", "--policy", 3)


def test_no_student_and_nothing_scored(world: World, run: Any, refused: Any) -> None:
    flags = world.flags("init")
    del flags[flags.index("--student") : flags.index("--student") + 2]
    assert run("init", *flags).status == 0
    assert "a policy" in refused("refresh")
    assert "a policy" in refused("train")
    assert run("init", *world.flags("init")).status == 0
    assert "scored parts to train on" in refused("train")


def test_teacher_with_nan_weights(world: World, teacher_dir: Path, run: Any, refused: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    world.teacher = world.copy(teacher_dir, "nan")
    path = str(world.teacher / "model.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    assert run("init", *world.flags("init")).status == 0
    assert run("rollout", *world.flags("rollout")).status == 0
    assert "finite teacher logits" in refused("score")
