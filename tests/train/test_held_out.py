"""Held-out measurement while training: on schedule, stopping early, the best student put back; all
of it goes on from a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    InputError,
    MismatchError,
    NumericsError,
    StillroomError,
)
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.pins import list_pins, unpin
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.evaluate import Evaluation, as_json, evaluate
from stillroom.train.held_out import HeldOutCallback
from stillroom.train.report import TrainReport
from stillroom.train.run_snapshot import pin_name
from stillroom.train.student import load_student
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=4, max_tokens=256, block_rows=2, window_rows=4)


@pytest.fixture(scope="module")
def caches(
    tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]
) -> tuple[Cache, Cache]:
    """Twelve rollouts to train on, four held out."""
    root = tmp_path_factory.mktemp("caches")
    return make_cache(root / "train"), make_cache(root / "held", rows=4, seed=3)


@pytest.fixture(scope="module")
def config(caches: tuple[Cache, Cache]) -> ReplayConfig:
    """Six steps; a learning rate that overshoots after the fourth."""
    return ReplayConfig(
        device="cpu",
        learning_rate=3e-2,
        num_train_epochs=2,
        eval_root=caches[1].storage.root,
        eval_steps=2,
        save_steps=1,
        replay=REPLAY,
    )


class Recorder(Callback):
    """What is measured at each step, and another learning rate from a step on."""

    def __init__(self, worse_after: int = 100, die_at: int = 100) -> None:
        """From which step on the student is made worse; at which step to die."""
        self.worse_after, self.die_at = worse_after, die_at
        self.logged: dict[int, float] = {}

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Disturb the student; look at what was logged."""
        found = trainer._logged.get("held_out/reverse_kl_nats")
        if found is not None:
            self.logged[outcome.step] = found
        if outcome.step >= self.worse_after:
            with torch.no_grad():
                trainer.student.model.model.norm.weight.mul_(2.0)

    def on_save(self, trainer: ReplayTrainer) -> None:
        """Die after a checkpoint."""
        if trainer.step == self.die_at:
            raise KeyboardInterrupt


def train(
    caches: tuple[Cache, Cache],
    student_dir: Path,
    output: Path,
    config: ReplayConfig,
    recorder: Recorder,
) -> tuple[TrainReport, ReplayTrainer]:
    """Train to the end."""
    made = ReplayTrainer(student_dir, caches[0], config, output=output, callbacks=(recorder,))
    return made.train(), made


def test_measured_on_schedule_and_at_the_end(
    caches: tuple[Cache, Cache], student_dir: Path, tmp_path: Path, config: ReplayConfig
) -> None:
    """What is logged is what `evaluate` says of the student; it trains on undisturbed."""
    recorder = Recorder()
    config = replace(config, eval_steps=4)
    report, made = train(caches, student_dir, tmp_path / "a", config, recorder)
    assert recorder.logged.keys() == {4}
    state = report.held_out
    found = evaluate(made.student, caches[1], caches[1].snapshot(), REPLAY)
    assert (state["step"], state["snapshot"]) == (6, caches[1].snapshot().id)
    assert state["measured"] == as_json(found)
    assert min(recorder.logged[4], found.reverse_kl_nats) == state["best_reverse_kl_nats"]
    before = load_student(inspect_model(str(student_dir)), "float32", torch.device("cpu"))
    first = evaluate(before, caches[1], caches[1].snapshot(), REPLAY)
    assert found.reverse_kl_nats < first.reverse_kl_nats
    assert any(state["snapshot"] in pinned.snapshots for pinned in list_pins(caches[1].storage))
    plain = replace(config, eval_root=None, eval_steps=0)
    undisturbed, _ = train(caches, student_dir, tmp_path / "b", plain, Recorder())
    assert undisturbed.losses == report.losses
    assert undisturbed.held_out == {}


def test_the_best_student_is_put_back(
    caches: tuple[Cache, Cache], student_dir: Path, tmp_path: Path, config: ReplayConfig
) -> None:
    """Also where the run died after it, and went on from a checkpoint; then training stops when its
    patience ends, and only the best student's weights are left."""
    config = replace(config, num_train_epochs=4, load_best_model_at_end=True)
    config = replace(config, early_stopping_patience=2)
    ends = []
    for name, die_at in (("unbroken", 100), ("killed", 6), ("twice", 8)):
        recorder = Recorder(worse_after=5, die_at=die_at)
        if die_at < 100:
            with pytest.raises(KeyboardInterrupt):
                train(caches, student_dir, tmp_path / name, config, recorder)
            recorder.die_at = 100
        report, made = train(caches, student_dir, tmp_path / name, config, recorder)
        assert recorder.logged[6] > recorder.logged[4] < recorder.logged[2]
        assert (report.steps, report.student_step) == (8, 4)
        assert "2 measurements without a lower held-out reverse KL" in report.stopped
        found = evaluate(made.student, caches[1], caches[1].snapshot(), REPLAY)
        assert (
            found.reverse_kl_nats == recorder.logged[4] == report.held_out["best_reverse_kl_nats"]
        )
        assert [p.name for p in (tmp_path / name / "best" / "replay").iterdir()] == [
            "step-00000004"
        ]
        ends.append({**report.held_out, "losses": report.losses[-1:]})
    assert ends[0] == ends[1]


@pytest.mark.parametrize("measure", ["forward_kl_nats", "hidden_kl_bound_nats"])
def test_a_measurement_that_is_not_finite_is_told(
    caches: tuple[Cache, Cache],
    student_dir: Path,
    tmp_path: Path,
    config: ReplayConfig,
    monkeypatch: pytest.MonkeyPatch,
    measure: str,
) -> None:
    """As a student gives it that rules a token out; no checkpoint could hold it."""

    def ruled_out(*args: Any, **kwargs: Any) -> Evaluation:
        found = evaluate(*args, **kwargs)
        changes: dict[str, Any] = {measure: math.inf}
        means = {name: replace(one, **changes) for name, one in found.sources.items()}
        return replace(found, sources=means)

    monkeypatch.setattr("stillroom.train.held_out.evaluate", ruled_out)
    with pytest.raises(NumericsError, match=rf"step 2, held_out/{measure}/student: .* got inf"):
        train(caches, student_dir, tmp_path, config, Recorder())


@pytest.mark.parametrize("save_steps", [2, 4])
def test_an_end_that_cannot_be_measured_is_taken_up_again(
    caches: tuple[Cache, Cache],
    student_dir: Path,
    tmp_path: Path,
    config: ReplayConfig,
    save_steps: int,
) -> None:
    """No step is trained again, and the same is measured; the best student is an earlier one."""
    scores, aside = tmp_path / "held" / "scores", tmp_path / "aside"
    shutil.copytree(caches[1].storage.folder, tmp_path / "held")
    config = replace(config, eval_root=str(tmp_path / "held"), eval_steps=4)
    config = replace(config, save_steps=save_steps, load_best_model_at_end=True)
    whole, _ = train(caches, student_dir, tmp_path / "whole", config, Recorder(worse_after=5))

    class Loses(Recorder):
        def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
            super().on_step(trainer, outcome)
            if outcome.step == 6:
                scores.rename(aside)

    with pytest.raises(StillroomError):
        train(caches, student_dir, tmp_path / "out", config, Loses(worse_after=5))
    aside.rename(scores)
    report, made = train(caches, student_dir, tmp_path / "out", config, Recorder())
    assert (report.steps, report.student_step, report.losses) == (6, 4, [])
    assert report.held_out == whole.held_out
    found = evaluate(made.student, caches[1], caches[1].snapshot(), REPLAY)
    assert found.reverse_kl_nats == report.held_out["best_reverse_kl_nats"]


@pytest.mark.parametrize("changes", [{"save_steps": 2}, {"save_steps": 0, "drift_every_steps": 2}])
def test_the_pin_is_renewed_though_nothing_is_measured(
    caches: tuple[Cache, Cache],
    student_dir: Path,
    tmp_path: Path,
    config: ReplayConfig,
    changes: dict[str, Any],
) -> None:
    """Where the run's own pin is: with checkpoints, and with records of drift."""
    storage, pinned = caches[1].storage, dict[int, bool]()

    class Unpins(Callback):
        def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
            name = pin_name(trainer.output, trainer.run)
            pinned[outcome.step] = any(pin.run == name for pin in list_pins(storage))
            if outcome.step == 1:
                unpin(storage, name)

    config = replace(config, eval_steps=0, **changes)
    made = ReplayTrainer(student_dir, caches[0], config, output=tmp_path, callbacks=[Unpins()])
    made.train()
    assert [pinned[1], pinned[3]] == [True, True]


def test_stops_at_its_goal(
    caches: tuple[Cache, Cache], student_dir: Path, tmp_path: Path, config: ReplayConfig
) -> None:
    """At the first measurement that is low enough; without load_best_model_at_end it keeps the
    last student."""
    recorder = Recorder()
    config = replace(config, stop_reverse_kl=1e9)
    report, _ = train(caches, student_dir, tmp_path, config, recorder)
    assert report.steps == report.student_step == 2
    assert report.stopped.endswith("at most 1e+09")


def test_caches_that_cannot_be_measured_on(
    caches: tuple[Cache, Cache],
    make_cache: Callable[..., Cache],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"train\.eval_root: expected another cache"):
        HeldOutCallback(caches[0], caches[0].storage.root)
    make_cache(tmp_path / "other", rows=3, topk=4)
    with pytest.raises(MismatchError, match="topk"):
        HeldOutCallback(caches[0], str(tmp_path / "other"))


@pytest.mark.parametrize("wrong", [{"step": "2"}, {"more": 1}, {"worse": None}, {"measured": 3}])
def test_another_state_is_refused(caches: tuple[Cache, Cache], wrong: dict[str, Any]) -> None:
    callback = HeldOutCallback(caches[0], caches[1].storage.root)
    state = json.loads(json.dumps(callback.state_dict()))
    callback.load_state_dict(state)
    with pytest.raises(CorruptError, match="held-out state in a checkpoint"):
        callback.load_state_dict({**state, **wrong})


def test_what_cannot_be_measured_is_found_before_the_first_step(
    caches: tuple[Cache, Cache], student_dir: Path, tmp_path: Path, config: ReplayConfig
) -> None:
    """Also where nothing is measured until the end: no row, or one that is too long."""
    longer, cache = caches
    Cache.create(tmp_path / "empty", cache.identity)
    longest = max(int(c.row_lengths()[:, 0].max()) for c in longer.snapshot().commits)
    replay = replace(REPLAY, max_tokens=longest - 1)
    for name, root, message in (
        ("empty", str(tmp_path / "empty"), "rows to replay; got an empty"),
        ("long", longer.storage.root, f"{longest} tokens"),
    ):
        given = replace(config, eval_root=root, eval_steps=0, replay=replay)
        made = ReplayTrainer(student_dir, cache, given, output=tmp_path / name)
        with pytest.raises(InputError, match=message):
            made.train()
        assert made.step == 0


def test_a_run_goes_on_with_the_cache_that_it_measured_on(
    caches: tuple[Cache, Cache], student_dir: Path, tmp_path: Path, config: ReplayConfig
) -> None:
    """Another address is a setting; another cache at that address is told apart too."""
    held = tmp_path / "held"
    shutil.copytree(caches[1].storage.folder, held)
    config = replace(config, eval_root=str(held))
    with pytest.raises(KeyboardInterrupt):
        train(caches, student_dir, tmp_path / "out", config, Recorder(die_at=2))
    other = replace(config, eval_root=caches[1].storage.root)
    with pytest.raises(MismatchError, match=r"train\.eval_root = "):
        train(caches, student_dir, tmp_path / "out", other, Recorder())
    shutil.rmtree(held)
    Cache.create(held, caches[1].identity)
    with pytest.raises(MismatchError, match="the cache that the checkpoint measured on"):
        train(caches, student_dir, tmp_path / "out", config, Recorder())
