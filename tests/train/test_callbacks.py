"""Callbacks are told of every step in their order, may stop a run, and survive in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.report import TrainReport
from stillroom.train.trainer import ReplayTrainer

CONFIG = ReplayConfig(
    device="cpu",
    learning_rate=1e-2,
    num_train_epochs=3,
    save_steps=2,
    replay=StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4),
)


class Listener(Callback):
    """Writes down what it is told."""

    name = "listener"

    def __init__(self, log: list[Any], stop_at: int = 0) -> None:
        """Into a list that may be others' too."""
        self.log, self.stop_at, self.counted = log, stop_at, 0

    def on_begin(self, trainer: ReplayTrainer) -> None:
        """With what was restored."""
        self.log.append(("begin", trainer.step, self.counted))

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Count it."""
        self.counted += 1
        self.log.append(outcome)
        trainer.log({"counted": self.counted})
        if outcome.step == self.stop_at:
            trainer.stop("enough")

    def on_save(self, trainer: ReplayTrainer) -> None:
        """At which step."""
        self.log.append(("save", trainer.step))

    def on_end(self, trainer: ReplayTrainer, report: TrainReport) -> None:
        """With the report."""
        self.log.append(("end", report.steps, report.stopped))

    def state_dict(self) -> dict[str, Any]:
        """How many."""
        return {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.counted = state["counted"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts: two steps an epoch."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def train(cache: Cache, student_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Trains with callbacks; gives the report and what trackers were told."""

    def run(*callbacks: Callback, config: ReplayConfig = CONFIG) -> tuple[TrainReport, list[Any]]:
        made = ReplayTrainer(student_dir, cache, config, output=tmp_path, callbacks=callbacks)
        told: list[Any] = []
        made._curves.add = lambda values, step: told.append((step, dict(values)))  # type: ignore[method-assign]
        return made.train(), told

    return run


def test_all_is_told_in_order(train: Callable[..., Any], cache: Cache) -> None:
    log: list[Any] = []
    report, told = train(Listener(log))
    outcomes = [event for event in log if isinstance(event, StepOutcome)]
    others = [event for event in log if not isinstance(event, StepOutcome)]
    assert others == [("begin", 0, 0), ("save", 2), ("save", 4), ("save", 6), ("end", 6, "")]
    assert [outcome.step for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert log.index(("save", 2)) == log.index(outcomes[1]) + 1
    assert [outcome.loss for outcome in outcomes] == report.losses
    assert [outcome.rows for outcome in outcomes] == [6] * 6
    assert sum(outcome.num_positions for outcome in outcomes) == 3 * cache.snapshot().positions
    assert [outcome.epoch for outcome in outcomes] == [0, 0, 1, 1, 2, 2]
    for outcome in outcomes:
        assert sum(len(one.loss) for one in outcome.micro) == outcome.num_positions
        assert outcome.tokens == outcome.forward_tokens <= outcome.padded_tokens
        assert outcome.wait_s >= 0 < outcome.compute_s
        assert outcome.gradient_norm > 0
    by_step = dict(told[:6])  # the end has a record of its own
    assert [by_step[step]["counted"] for step in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert by_step[3]["loss_nats"] == report.losses[2]


def test_a_run_that_is_stopped_says_why(train: Callable[..., Any]) -> None:
    log: list[Any] = []
    report, _ = train(Listener(log, stop_at=3))
    assert (report.steps, report.stopped, len(report.losses)) == (3, "enough", 3)
    assert log[-1] == ("end", 3, "enough")


def test_state_comes_back_before_the_run_goes_on(train: Callable[..., Any]) -> None:
    """From the checkpoint of where it stopped, though a callback without a name was there."""
    train(Callback(), Listener([], stop_at=5))
    log: list[Any] = []
    report, _ = train(Listener(log))
    assert log[0] == ("begin", 5, 5)
    assert report.steps == 6
    assert len(report.losses) == 1


def test_a_shared_prompt_is_forwarded_once(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "root", samples=3)
    config = replace(CONFIG, replay=replace(CONFIG.replay, group_rows=3), max_steps=1)
    log: list[Any] = []
    made = ReplayTrainer(student_dir, cache, config, output=tmp_path, callbacks=[Listener(log)])
    made.train()
    (outcome,) = (event for event in log if isinstance(event, StepOutcome))
    assert outcome.forward_tokens < outcome.tokens < outcome.padded_tokens


@pytest.mark.parametrize("name", ["listener", "drift", "pace", "phases"])
def test_two_of_one_name_are_refused(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path, name: str
) -> None:
    """One's state in a checkpoint would be the other's."""
    first, second = Listener([]), Listener([])
    second.name = name
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"names that differ; got {name} twice"):
        ReplayTrainer(student_dir, cache, CONFIG, output=tmp_path, callbacks=[first, second])
