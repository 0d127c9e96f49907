"""`run` from end to end on tiny random models, and what bad input gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, InputError, MismatchError
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_versions
from stillroom.train.config import RunConfig, build_settings
from stillroom.train.pipeline import Pipeline

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


def test_second_run_changes_nothing(
    finished: tuple[dict[str, Any], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished rounds are found; no object is added, and the same tables are printed."""
    settings, summary = finished
    before = files_below(Path(settings["root"]))
    assert pipeline(settings).run().as_json() == summary
    assert files_below(Path(settings["root"])) == before
    assert "round 2: policy 1 -> 2" in capsys.readouterr().out


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
    with pytest.raises(ConfigError, match=r"run\.json.*settings of the run"):
        pipeline({**settings, "train": train})
    with pytest.raises(MismatchError, match=r"topk = 16.*topk = 8"):
        pipeline({**settings, "topk": 8, "output": settings["output"] + "2"})


def test_prompts_must_not_be_held_out(run_settings: Settings, tmp_path: Path) -> None:
    """A prompt in both files would make the measurement worthless; nothing is written."""
    settings = run_settings(tmp_path)
    with pytest.raises(InputError, match="training prompts too"):
        pipeline({**settings, "held_out": settings["prompts"]}).run()
    assert list(tmp_path.iterdir()) == []
