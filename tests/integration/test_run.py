"""`run` from end to end on tiny random models, and what bad input gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stillroom.cache.errors import (
    ConfigError,
    InputError,
    MismatchError,
    MissingError,
    NumericsError,
)
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_versions
from stillroom.train.pipeline import Pipeline
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings
from stillroom.train.stages import StageLog
from stillroom.train.summary import printable

Settings = Callable[[Path], dict[str, Any]]


def files_below(folder: Path) -> dict[str, tuple[int, float]]:
    """Every file with its size and time."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime)
        for p in folder.rglob("*")
        if p.is_file()
    }


def pipeline(settings: dict[str, Any]) -> Pipeline:
    """A run of these settings."""
    return Pipeline(build_settings(RunConfig, settings, "settings"))


@pytest.fixture(scope="module")
def finished(
    run_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the summary of a run of two rounds."""
    settings = run_settings(tmp_path_factory.mktemp("run"))
    pipeline(settings).run()
    return settings, json.loads((Path(settings["output"]) / "summary.json").read_text())


def test_rounds_are_whole(finished: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Each round sampled, scored, trained and published; figures are there and agree."""
    settings, summary = finished
    cache = Cache.open(settings["root"])
    assert policy_versions(cache.storage) == [0, 1, 2]
    assert len(cache.parts()) == len(cache.commits()) == 4
    assert cache.storage.list("pins") == [], "a run that is through keeps nothing from gc"
    assert [r["rollouts"] for r in summary["rounds"]] == [6, 6]
    first, second = summary["rounds"]
    assert first["after"] == second["before"]
    assert set(second["drift"]) == {"0", "1"}
    assert second["drift"]["0"]["lag"] == 1
    assert first["replayed_positions"] == 2 * first["positions"]
    assert second["replayed_positions"] == 2 * (first["positions"] + second["positions"])
    assert summary["live_teacher_s"] > summary["teacher_s"] > 0
    for source in ("student", "teacher"):
        change = summary["held_out"][source]
        assert change["fell_by"] == pytest.approx(1 - change["last_nats"] / change["first_nats"])
    assert len(summary["samples"]) == 3
    stages = StageLog(Path(settings["output"]) / "stages")
    for number in range(2):
        trained = stages.finished(f"train-{number}")
        assert trained is not None
        assert trained.values["pace"]["tokens_per_s"] > 0
        assert (trained.values["stopped"], trained.values["held_out"]) == ("", {})


def test_second_run_changes_nothing(
    finished: tuple[dict[str, Any], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished rounds are found; no object is added, and the same tables are printed."""
    settings, summary = finished
    before = files_below(Path(settings["root"]))
    assert pipeline(settings).run().as_json() == summary
    assert files_below(Path(settings["root"])) == before
    out = capsys.readouterr().out
    assert "round 2: policy 1 -> 2" in out
    figures = [summary["rounds"][1][when]["student"] for when in ("before", "after")]
    hidden = [f"{figure['hidden_kl_bound_nats']:.4f}" for figure in figures]
    *_, line, _ = (line for line in out.splitlines() if "forward KL hidden in it" in line)
    assert [word for word in line.split() if word[0].isdigit()] == hidden


def test_more_rounds_continue(
    finished: tuple[dict[str, Any], dict[str, Any]], run_settings: Settings
) -> None:
    """Raising the number of rounds adds one; prompts that were never sampled come first."""
    settings, summary = finished
    more = pipeline({**settings, "rounds": 3}).run().as_json()
    assert more["rounds"][:2] == summary["rounds"]
    cache = Cache.open(settings["root"])
    assert policy_versions(cache.storage) == [0, 1, 2, 3]
    assert {p[:7] for p in cache.retired()} == {"v000000"}
    pipelined = cache.storage.get("units/v000001.json"), cache.storage.get("units/v000000.json")
    sampled = [
        {i for unit in json.loads(plan)["units"] for i in unit["prompt_ids"]} for plan in pipelined
    ]
    assert not sampled[0] & sampled[1]


def test_other_settings_are_refused(finished: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A run's output and root keep to the settings that they were made with."""
    settings, _ = finished
    train = {**settings["train"], "learning_rate": 0.5}
    with pytest.raises(ConfigError, match=r"run\.json.*train.learning_rate = 0.01; got.* = 0.5"):
        pipeline({**settings, "train": train})
    with pytest.raises(MismatchError, match=r"topk = 16.*topk = 8"):
        pipeline({**settings, "topk": 8, "output": settings["output"] + "2"})


def test_prompts_must_not_be_held_out(run_settings: Settings, tmp_path: Path) -> None:
    """A prompt in both files would make the measurement worthless; nothing is written."""
    settings = run_settings(tmp_path)
    with pytest.raises(InputError, match="training prompts too"):
        pipeline({**settings, "held_out": settings["prompts"]}).run()
    assert list(tmp_path.iterdir()) == []


def test_the_machine_may_change(finished: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Settings that say how a run runs, not what it is, may change while it goes on."""
    settings, _ = finished
    teacher = {**settings["teacher"], "max_batch_tokens": 64, "head_rows": 8}
    other = pipeline({**settings, "teacher": teacher, "accept_numerics": True})
    assert other.name == pipeline(settings).name


def refused(settings: dict[str, Any], folder: Path, error: type[Exception], match: str) -> None:
    """A run that must end in an error and leave nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=match):
        pipeline(settings).run()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("train", "lr_scheduler_type"), "foo", "train.lr_scheduler_type"),
        (("train", "optimizer"), "LBFGS", "train.optimizer"),
        (("sampler", "device"), "cuda:99", "device.*cuda:99"),
        (("teacher", "device"), "nonsense", "device.*nonsense"),
        (("sampler", "max_new_tokens"), 256, "room for a prompt"),
        (("prompts", "max_tokens"), 1, "a prompt of at most 1 tokens"),
    ],
)
def test_what_cannot_run_writes_nothing(
    run_settings: Settings, tmp_path: Path, place: tuple[str, str], value: object, match: str
) -> None:
    """Settings are tried before the first byte is written."""
    settings = run_settings(tmp_path)
    settings[place[0]] = {**settings[place[0]], place[1]: value}
    refused(settings, tmp_path, ConfigError if "max_tokens" not in place else InputError, match)


def test_further_data_is_looked_at_first(run_settings: Settings, tmp_path: Path) -> None:
    """Caches and datasets of the training, which is the last job of a round."""
    settings = run_settings(tmp_path)
    for further in ({"eval_root": str(tmp_path / "none")}, {"phases": [{"root": "none"}]}):
        refused(
            {**settings, "train": {"replay": settings["train"]["replay"], **further}},
            tmp_path,
            MissingError,
            "none",
        )


def test_nan_teacher_writes_nothing(
    run_settings: Settings, tmp_path: Path, teacher_dir: Path
) -> None:
    """A teacher that gives NaN is found out before the root is made."""
    broken = tmp_path / "teacher"
    shutil.copytree(teacher_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    settings = run_settings(tmp_path)
    settings["teacher"] = {"model": str(broken), "device": "cpu"}
    refused(settings, tmp_path, NumericsError, "finite teacher logits")


def test_names_and_texts_are_only_printed(run_settings: Settings, tmp_path: Path) -> None:
    """Brackets and control characters in a prompt's name are not obeyed by the printer."""
    lines = [{"prompt_name": f"[/x]\x1b[2J {i}", "prompt": f"held {i}: abc"} for i in range(3)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = run_settings(tmp_path)
    settings |= {"held_out": {"source": str(tmp_path / "odd.jsonl")}, "rounds": 1}
    summary = pipeline(settings).run()
    assert summary.samples[0]["prompt"] == "[/x]\x1b[2J 0"
    assert printable(summary.samples[0]["prompt"]) == "[/x]\ufffd[2J 0"


def test_prompts_are_rendered_once(
    run_settings: Settings, tmp_path: Path, student_dir: Path
) -> None:
    """A template that renders otherwise tomorrow does not stop what was planned today."""
    student = tmp_path / "student"
    shutil.copytree(student_dir, student)
    settings = run_settings(tmp_path) | {"student": str(student), "rounds": 1}
    log = StageLog(tmp_path / "out" / "stages")
    run = pipeline(settings)
    run._score_round = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        run.run()
    part = next((tmp_path / "root" / "rollouts").iterdir())
    part.unlink()
    template = student / "chat_template.jinja"
    template.write_text("today is another day. " + template.read_text())
    assert log.finished("rollout-0") is None
    pipeline(settings).run()
    assert part.is_file()
