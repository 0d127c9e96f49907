"""A run's stream: prompts shared where that changes nothing, what is not replayed is told,
and what is replayed is pinned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.cache.pins import active_pins
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.config import ReplayConfig
from stillroom.train.report import TrainReport
from stillroom.train.run_snapshot import pin_name, release_snapshot, snapshot_for
from stillroom.train.run_stream import stream_config
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4)
CONFIG = ReplayConfig(
    device="cpu", learning_rate=1e-2, num_train_epochs=3, drift_every_steps=2, replay=REPLAY
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twenty-four scored rollouts, four of each prompt."""
    return make_cache(tmp_path_factory.mktemp("grouped"), rows=24, samples=4)


def trainer(
    cache: Cache, student_dir: Path, output: Path, config: ReplayConfig = CONFIG, run: str = "r"
) -> ReplayTrainer:
    """A trainer of the tiny student, as policy 0."""
    settings: dict[str, Any] = {"policy_version": 0, "output": output, "run": run}
    return ReplayTrainer(student_dir, cache, config, snapshot=cache.snapshot(), **settings)


@pytest.mark.parametrize(
    ("device", "bf16", "shares"),
    [("cpu", False, True), ("cpu", True, False), ("cuda", False, False), ("cuda", True, False)],
)
def test_prompts_are_shared_on_a_cpu_in_float32_unless_told_otherwise(
    grouped: Cache,
    student_dir: Path,
    tmp_path: Path,
    device: str,
    bf16: bool,
    shares: bool,
) -> None:
    config = replace(CONFIG, replay=replace(REPLAY, batch_rows=8, group_rows=4))
    made = trainer(grouped, student_dir, tmp_path, replace(config, bf16=bf16))
    prefixes = [m.prefix for m in made.stream.next_batch().micro_batches if m is not None]
    assert (np.concatenate(prefixes) >= 0).sum() == (0 if bf16 else 8)

    def shared(replay: StreamConfig) -> bool | None:
        where = torch.device(device)
        return stream_config(replay, made.student, where, print, bf16=bf16).share_prompts

    assert shared(config.replay) == shares
    assert shared(replace(config.replay, share_prompts=not shares)) != shares
    assert not shared(REPLAY)


@pytest.mark.parametrize("over_long", ["skip", "truncate"])
def test_rows_that_are_not_read_whole_are_told(
    cache: Cache,
    student_dir: Path,
    tmp_path: Path,
    over_long: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, and in the report."""
    (commit,) = cache.snapshot().commits
    lengths = np.array(commit.row_lengths(), np.int64)
    limit = int(np.median(lengths[:, 0]))
    assert (lengths[:, 1] < limit).all(), "each row keeps a position"
    over = int((lengths[:, 0] > limit).sum())
    replay = replace(REPLAY, batch_rows=3, max_tokens=limit, over_long=over_long)
    config = replace(CONFIG, num_train_epochs=1, replay=replay)
    report = trainer(cache, student_dir, tmp_path, config, run=over_long).train()
    said = capsys.readouterr().out
    if over_long == "skip":
        assert (report.left_out, report.truncated) == ({"over_long": over}, 0)
        assert said.count(f"  rows left out: {over} by over_long\n") == 1
    else:
        assert (report.left_out, report.truncated) == ({}, over)
        assert said.count(f"  {over} truncated\n") == 1


def test_rows_that_are_not_read_are_told_again_after_newer_commits(
    make_cache: Callable[..., Cache],
    student_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = make_cache(tmp_path / "cache")
    limit = int(np.median(cache.snapshot().commits[0].row_lengths()[:, 0]))
    replay = replace(REPLAY, batch_rows=2, max_tokens=limit, over_long="skip", follow_every_steps=1)
    made = trainer(cache, student_dir, tmp_path, replace(CONFIG, replay=replay))
    made._take_step(TrainReport())
    make_cache(tmp_path / "cache", seed=1)
    for _ in range(2):
        made._take_step(TrainReport())
    lengths = [commit.row_lengths()[:, 0] for commit in cache.snapshot().commits]
    over = [int((np.concatenate(lengths[:n]) > limit).sum()) for n in (1, 2)]
    assert over[0] < over[1]
    said = re.findall(r"rows left out: (\d+) by over_long\n", capsys.readouterr().out)
    assert said == [str(count) for count in over]


def test_nothing_is_said_where_every_row_is_read_whole(
    cache: Cache, student_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(cache, student_dir, tmp_path)
    assert made.stream.feeds[0].selection.missing == ""
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "truncated" not in said


@pytest.mark.parametrize(
    "changes", [{"save_steps": 1, "drift_every_steps": 100}, {"drift_every_steps": 1}]
)
def test_a_run_pins_what_it_trains_on(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Before it opens it, and again at every checkpoint and drift record."""
    cache = make_cache(tmp_path / "root")
    chosen = snapshot_for(cache, tmp_path, "r").id
    name = pin_name(tmp_path, "r")
    assert active_pins(cache.storage)[name].snapshots == [chosen]
    made = trainer(cache, student_dir, tmp_path, replace(CONFIG, **changes))
    release_snapshot(cache.storage, tmp_path, "r")
    assert active_pins(cache.storage) == {}
    made._take_step(TrainReport())
    assert active_pins(cache.storage)[name].snapshots == [chosen]


def test_a_run_that_follows_pins_before_it_opens(
    make_cache: Callable[..., Cache],
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what its checkpoint would go on with stays pinned beside it."""
    cache = make_cache(tmp_path / "root")
    first = snapshot_for(cache, tmp_path, "r").id
    name = pin_name(tmp_path, "r")
    replay = replace(REPLAY, follow_every_steps=2)
    config = replace(CONFIG, replay=replay, save_steps=1, drift_every_steps=100)
    made = trainer(cache, student_dir, tmp_path, config)
    open_snapshot, opened = Cache.open_snapshot, dict[str, list[str]]()

    def noting(self: Cache, snapshot_id: str) -> Snapshot:
        opened[snapshot_id] = active_pins(cache.storage)[name].snapshots
        return open_snapshot(self, snapshot_id)

    monkeypatch.setattr(Cache, "open_snapshot", noting)
    for _ in range(2):
        made._take_step(TrainReport())
    make_cache(tmp_path / "root", seed=1)
    second = cache.snapshot().id
    made._take_step(TrainReport())
    assert made.stream.snapshots == [second] != [first]
    assert opened == {second: sorted([first, second])}
    assert active_pins(cache.storage)[name].snapshots == sorted([first, second])
    made._take_step(TrainReport())
    assert active_pins(cache.storage)[name].snapshots == [second], "two checkpoints are kept"
