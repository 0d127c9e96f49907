"""docs/replay.md runs, its settings are some, and its table has every condition."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.schema import FINISH_REASONS, SOURCES
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.row_filter import RowFilter
from stillroom.train.config import ReplayConfig
from stillroom.train.settings import build_settings
from tests.replay.conftest import IDENTITY, add_scored_part

TEXT = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
TABLE = "".join(re.findall(r"^\|.*\n", TEXT, flags=re.MULTILINE))


def blocks(language: str) -> list[str]:
    """Its listings."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"output": tmp_path / "output", "resumed": None}
    for name in ("runs/quickstart/cache", "fresh", "teacher_written"):
        found[name] = Cache.create(tmp_path / name, IDENTITY)
        add_scored_part(found[name], 0, 0, 60)
    found["output"].mkdir()
    for block in blocks("python"):
        exec(block, found)
    assert len(found["batch"].rows) == 8
    assert found["state"]["step"] == 1
    with found["stream"] as stream:
        caches = stream.next_batch().caches
    assert [caches.count(cache) for cache in (0, 1)] == [48, 16]
    assert stream.feeds[1].selection.left_out == {"sources": 40}
    assert stream.missing.endswith("teacher_written: rows left out: 40 by sources")
    assert found["snapshot"].id == found["cache"].snapshot().id
    assert capfd.readouterr().err == ""


def test_the_settings_are_some() -> None:
    (settings,) = (
        build_settings(ReplayConfig, yaml.safe_load(block)["train"], "x")
        for block in blocks("yaml")
    )
    replay = settings.replay
    assert (replay.over_long, replay.lag_half_life) == ("truncate", 2)
    assert replay.rows == RowFilter(
        max_lag=4,
        finish_reasons=("stop",),
        exclude_rollouts=(17, 23),
        ranges={"x_reward": (0.5, None)},
    )


def test_every_condition_has_a_place_in_the_table() -> None:
    named = set(re.findall(r"`([a-z_]+)`", TABLE))
    conditions = {field.name for field in fields(RowFilter)}
    assert named == conditions | set(FINISH_REASONS) | set(SOURCES) | {"null"}


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"`([a-z]+_[a-z_]+)(?:: [^`]*)?`", TEXT.replace(TABLE, "")))
    known = {field.name for kind in (StreamConfig, RowFilter) for field in fields(kind)}
    calls = {"next_batch", "state_dict", "load_state_dict", "keep_snapshot", "vocab_size"}
    assert named - known == calls
