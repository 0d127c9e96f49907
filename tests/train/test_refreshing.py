"""Refreshing in the middle of a run: the rows are those of the student of that moment, they come
with the very next step, and older ones go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from stillroom.cache.errors import ConfigError, CorruptError, MismatchError, MissingError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.part import policy_of
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import open_policy, policy_versions, read_policy, register_initial
from stillroom.replay.prompts import PromptsConfig, load_prompts
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.checkpoint import checkpoints_of, newest_checkpoint
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.phases import Phase
from stillroom.train.publish import publish
from stillroom.train.refreshing import RefreshCallback, Refresher
from stillroom.train.run_snapshot import pin_name
from stillroom.train.trainer import ReplayTrainer

EVERY = 3
CHILD = Path(__file__).with_name("refreshing_child.py")
CONFIG = ReplayConfig(
    device="cpu",
    learning_rate=1e-2,
    max_steps=8,
    drift_every_steps=4,
    replay=StreamConfig(
        batch_rows=2, max_tokens=256, block_rows=2, window_rows=4, follow_every_steps=EVERY
    ),
)
SAMPLER = SamplerConfig(max_new_tokens=6, device="cpu")
REFRESH = RefreshConfig(prompts_per_cycle=4, unit_rollouts=4, max_lag=0)


class Recorder(Callback):
    """Keeps what each step replayed."""

    def __init__(self) -> None:
        self.versions = list[set[int]]()
        self.gaps = list[float]()

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        versions = np.concatenate([micro.policy_version for micro in outcome.micro])
        gap = [np.abs(m.student_logprob - m.behaviour_logprob) for m in outcome.micro]
        self.versions.append(set(versions.tolist()))
        self.gaps.append(float(np.concatenate(gap).max()))


@dataclass
class Setup:
    """A cache with scored rollouts of policy 0, and what refreshes it."""

    root: Path
    student: Path
    refresher: Refresher
    recorder: Recorder = field(default_factory=Recorder)

    def trainer(self, output: str = "out", config: ReplayConfig = CONFIG) -> ReplayTrainer:
        """A trainer that refreshes."""
        callbacks = (self.recorder, RefreshCallback(self.refresher))
        folder = self.root.parent / output
        return ReplayTrainer(
            str(self.student), self.refresher.cache, config, output=folder, callbacks=callbacks
        )


@pytest.fixture
def make_setup(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path
) -> Callable[..., Setup]:
    """Makes a cache that the teacher filled from policy 0."""

    def make(refresh: RefreshConfig = REFRESH, prompts: Path = prompts_file) -> Setup:
        teacher_config = TeacherConfig(model=str(teacher_dir), device="cpu")
        files = inspect_model(str(teacher_dir))
        cache = Cache.create(
            tmp_path / "root", identity_of(files, teacher_config, ScoreSpec(topk=16))
        )
        student = inspect_model(str(student_dir))
        register_initial(cache.storage, student, "test")
        read = load_prompts(
            PromptsConfig(source=str(prompts)), AutoTokenizer.from_pretrained(student_dir), 64
        )
        teacher = TransformersTeacher(files, teacher_config)
        refresher = Refresher(cache, teacher, read.prompts, SAMPLER, refresh)
        refresher(0, lambda: TransformersSampler(student, SAMPLER))
        return Setup(tmp_path / "root", student_dir, refresher)

    return make


@pytest.mark.parametrize("accumulated", [1, 2])
def test_new_rows_come_with_the_next_step_and_are_the_students_of_that_moment(
    make_setup: Callable[..., Setup], accumulated: int
) -> None:
    setup = make_setup()
    replay = replace(CONFIG.replay, follow_every_steps=EVERY * accumulated)
    config = replace(CONFIG, gradient_accumulation_steps=accumulated, replay=replay)
    trainer = setup.trainer(config=config)
    embedding: Any = trainer.student.model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    report = trainer.train()
    assert report.steps == 8
    assert setup.recorder.versions == [{0}, {0}, {0}, {1}, {1}, {1}, {2}, {2}]
    gaps = setup.recorder.gaps
    assert max(gaps[0], gaps[EVERY], gaps[2 * EVERY]) < 1e-3 < min(gaps[1], gaps[4], gaps[7])
    assert not torch.equal(embedding.weight, before)


def test_students_in_between_are_recorded_without_weights(
    make_setup: Callable[..., Setup],
) -> None:
    setup = make_setup()
    trainer = setup.trainer()
    trainer.train()
    storage = trainer.cache.storage
    found = [read_policy(storage, version) for version in policy_versions(storage)]
    assert [(p.parent, p.step, p.path is None) for p in found] == [
        (None, 0, False),
        (0, EVERY, True),
        (1, 2 * EVERY, True),
    ]
    assert {p.run for p in found[1:]} == {pin_name(trainer.output, trainer.run)}
    with pytest.raises(MissingError, match="went on from it after step 3"):
        open_policy(storage, 1)
    policy = publish(
        storage,
        trainer.student,
        trainer.files,
        version=trainer.policy_version + 1,
        parent=trainer.policy_version,
        run=trainer.run,
        step=trainer.step,
    )
    assert (policy.version, policy.parent) == (3, 2)
    assert open_policy(storage, 3).fingerprint == policy.fingerprint


@pytest.mark.parametrize("max_lag", [0, 1])
def test_rows_of_older_students_go(make_setup: Callable[..., Setup], max_lag: int) -> None:
    setup = make_setup(replace(REFRESH, max_lag=max_lag))
    trainer = setup.trainer()
    trainer.train()
    cache = setup.refresher.cache
    kept = {policy_of(part) for part in cache.parts() if part not in cache.retired()}
    assert kept == set(range(2 - max_lag, 3))
    newest = setup.recorder.versions[-2:]
    assert set().union(*newest) <= kept
    assert cache.unscored() == []
    assert setup.refresher.positions == sum(cache.commit_of(p).positions for p in cache.parts())


def test_drift_says_how_far_behind_rows_are(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup(replace(REFRESH, max_lag=1))
    report = setup.trainer().train()
    lags = {version: sums["lag"] for version, sums in report.drift.items()}
    assert lags == {version: 2 - int(version) for version in lags}
    assert "2" in lags


def test_adapters_are_merged_into_what_samples(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    setup.trainer(config=replace(CONFIG, lora=LoraSettings(r=2))).train()
    gaps = setup.recorder.gaps
    assert setup.recorder.versions[EVERY] == {1}
    assert gaps[EVERY] < 1e-3 < gaps[EVERY + 1]


def test_a_resumed_run_leaves_what_it_sampled_later(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    config = replace(CONFIG, save_steps=5, save_total_limit=3)
    ended_run(setup, 7, config)
    setup.trainer(config=config).train()
    assert setup.recorder.versions == [{1}, {3}, {3}]
    storage = setup.refresher.cache.storage
    later = read_policy(storage, 3)
    assert (later.parent, later.step) == (1, 2 * EVERY)


def test_a_run_resumed_where_it_refreshed_samples_anew(make_setup: Callable[..., Setup]) -> None:
    """Rows of that moment may be retired already."""
    setup = make_setup()
    config = replace(CONFIG, save_steps=EVERY, max_steps=11)
    ended_run(setup, 10, config)
    again = setup.trainer(config=config)
    again.train()
    assert setup.recorder.versions == [{4}, {4}]
    assert read_policy(again.cache.storage, 4).parent == 2
    assert setup.recorder.gaps[0] < 1e-3


def test_a_run_in_another_folder_leaves_the_rows_of_the_first(
    make_setup: Callable[..., Setup],
) -> None:
    """Though both have the same name."""
    setup = make_setup(replace(REFRESH, max_lag=9))
    setup.trainer("first").train()
    cache = setup.refresher.cache
    setup.trainer("second").train()
    assert cache.retired() == set()
    assert {policy_of(part) for part in cache.parts()} == {0, 1, 2, 3, 4}
    assert read_policy(cache.storage, 3).parent == 0


class Stopped(Exception):
    """Ends a run between two steps."""


class StopAt(Callback):
    """Ends a run with an error after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        if outcome.step == self.step:
            raise Stopped


def ended_run(setup: Setup, step: int, config: ReplayConfig) -> None:
    """A run that ends with an error; what it replayed is forgotten."""
    trainer = setup.trainer(config=config)
    trainer.callbacks = (*trainer.callbacks, StopAt(step))
    with pytest.raises(Stopped):
        trainer.train()
    setup.recorder.versions.clear()
    setup.recorder.gaps.clear()


def test_a_run_that_starts_again_replays_nothing_of_its_later_students(
    make_setup: Callable[..., Setup],
) -> None:
    setup = make_setup(replace(REFRESH, max_lag=9))
    ended_run(setup, 7, CONFIG)
    setup.trainer(config=CONFIG).train()
    found = setup.recorder.versions
    assert set().union(*found[:3]) == {0}
    assert set().union(*found) == {0, 3, 4}
    assert setup.recorder.gaps[0] < 1e-3
    assert read_policy(setup.refresher.cache.storage, 3).parent == 0


def test_a_run_that_starts_again_with_nothing_left_samples_first(
    make_setup: Callable[..., Setup],
) -> None:
    """Its later students had retired the rows that it began with."""
    setup = make_setup()
    ended_run(setup, 4, CONFIG)
    trainer = setup.trainer(config=CONFIG)
    again = read_policy(trainer.cache.storage, 2)
    assert (again.parent, again.step) == (0, 0)
    trainer.train()
    assert setup.recorder.versions == [{2}, {2}, {2}, {3}, {3}, {3}, {4}, {4}]
    assert setup.recorder.gaps[0] < 1e-3
    assert read_policy(trainer.cache.storage, 3).parent == 2


def test_what_a_resumed_run_left_uses_up_no_lag(make_setup: Callable[..., Setup]) -> None:
    """Saved at step 4 with students 0 and 1, ended at 7 with 2; then 3 comes after 1."""
    setup = make_setup(replace(REFRESH, max_lag=2))
    config = replace(CONFIG, save_steps=4)
    ended_run(setup, 7, config)
    trainer = setup.trainer(config=config)
    trainer.train()
    cache = trainer.cache
    assert {policy_of(part) for part in cache.parts() if part not in cache.retired()} == {0, 1, 3}
    assert read_policy(cache.storage, 3).parent == 1


@pytest.mark.parametrize("every", [0, -1, 3])
def test_streams_that_do_not_follow_by_whole_steps_are_refused(
    make_setup: Callable[..., Setup], every: int
) -> None:
    replay = replace(CONFIG.replay, follow_every_steps=every)
    config = replace(CONFIG, gradient_accumulation_steps=2, replay=replay)
    with pytest.raises(ConfigError, match="follow_every_steps"):
        make_setup().trainer(config=config).train()


def test_phases_are_refused(make_setup: Callable[..., Setup]) -> None:
    config = replace(CONFIG, max_steps=-1, phases=(Phase(max_steps=4), Phase(max_steps=4)))
    with pytest.raises(ConfigError, match="2 phases"):
        make_setup().trainer(config=config).train()


def test_too_few_rows_are_refused(make_setup: Callable[..., Setup], tmp_path: Path) -> None:
    setup = make_setup()
    setup.refresher.config = replace(REFRESH, prompts_per_cycle=1)
    with pytest.raises(ConfigError, match="prompts_per_cycle"):
        setup.trainer().train()


@pytest.mark.parametrize("state", [{}, {"version": -1}, {"version": "1"}, {"version": True}])
def test_a_state_without_a_version_is_refused(
    make_setup: Callable[..., Setup], state: dict[str, Any]
) -> None:
    callback = RefreshCallback(make_setup().refresher)
    callback.load_state_dict({"version": None})
    with pytest.raises(CorruptError, match="policy version"):
        callback.load_state_dict(state)


def test_a_student_that_is_no_policy_is_refused(
    make_setup: Callable[..., Setup], teacher_dir: Path
) -> None:
    setup = make_setup()
    setup.student = teacher_dir
    with pytest.raises(MismatchError, match="policy of the cache"):
        setup.trainer().train()


def test_a_score_that_fails_retires_nothing(
    make_setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup()
    trainer = setup.trainer()

    def fail(*_: Any) -> None:
        raise MissingError("teacher", "an answer", "none", "Try again.")

    monkeypatch.setattr(setup.refresher.teacher, "score", fail)
    with pytest.raises(MissingError):
        trainer.train()
    assert not setup.refresher.cache.retired()
    assert len(setup.refresher.cache.unscored()) == 1
    monkeypatch.undo()
    setup.trainer("other").train()
    assert not setup.refresher.cache.unscored()


def kill_while_it_refreshes(setup: Setup, teacher: Path, prompts: Path, save_steps: int) -> None:
    """Start a run in a process of its own, and kill it once its second student is recorded."""
    storage, output = setup.refresher.cache.storage, setup.root.parent / "out"
    arguments = (setup.root, setup.student, teacher, prompts, output, save_steps)
    child = subprocess.Popen([sys.executable, str(CHILD), *map(str, arguments)])
    try:
        end = time.monotonic() + 120
        while 2 not in policy_versions(storage):
            assert time.monotonic() < end
            assert child.poll() is None
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def test_weights_that_a_killed_run_left_are_removed(make_setup: Callable[..., Setup]) -> None:
    setup = make_setup()
    left = setup.root.parent / "out" / ".sampled-replay"
    (left / "student").mkdir(parents=True)
    setup.trainer()
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_is_killed_before_its_first_checkpoint_starts_again(
    make_setup: Callable[..., Setup], teacher_dir: Path, prompts_file: Path
) -> None:
    setup = make_setup()
    kill_while_it_refreshes(setup, teacher_dir, prompts_file, save_steps=0)
    trainer = setup.trainer()
    first = trainer.policy_version
    assert first > 2
    assert read_policy(trainer.cache.storage, first).parent == 0
    assert trainer.train().steps == 8
    versions = [first] * EVERY + [first + 1] * EVERY + [first + 2] * 2
    assert setup.recorder.versions == [{version} for version in versions]
    assert setup.recorder.gaps[0] < 1e-3


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_is_killed_while_it_refreshes_goes_on(
    make_setup: Callable[..., Setup], teacher_dir: Path, prompts_file: Path
) -> None:
    setup = make_setup()
    kill_while_it_refreshes(setup, teacher_dir, prompts_file, save_steps=1)
    storage, output = setup.refresher.cache.storage, setup.root.parent / "out"
    assert newest_checkpoint(checkpoints_of(output, "replay")) is not None
    trainer = setup.trainer(config=replace(CONFIG, save_steps=1, max_steps=11))
    report = trainer.train()
    assert report.steps == 11
    policies = [read_policy(storage, version) for version in policy_versions(storage)]
    cache = setup.refresher.cache
    kept = {policy_of(part) for part in cache.parts() if part not in cache.retired()}
    assert kept == {max(p.version for p in policies)}
    assert kept == {trainer.policy_version}
    assert {p.step for p in policies} == {0, EVERY, 2 * EVERY, 3 * EVERY}
    assert cache.unscored() == []
