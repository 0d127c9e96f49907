"""What a resumed run keeps of its beginning: its length, its student and its settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cache.errors import ConfigError, MismatchError, StorageError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.phases import Phase
from stillroom.train.report import TrainReport
from stillroom.train.run_snapshot import pin_name, snapshot_for
from stillroom.train.student import load_student
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4)
CONFIG = ReplayConfig(
    device="cpu", learning_rate=1e-2, max_steps=3, save_steps=1, optimizer="SGD", replay=REPLAY
)


class Dies(Callback):
    """Ends the process's work after the checkpoint of a step; keeps each step's rate."""

    def __init__(self, after: int = 0, grows: Callable[[], object] | None = None) -> None:
        """Where to die (0: nowhere), and what happens after the first step."""
        self._after, self._grows = after, grows
        self.rates: dict[int, float] = {}

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Grow the cache once."""
        self.rates[outcome.step] = outcome.learning_rate
        if outcome.step == 1 and self._grows is not None:
            self._grows()

    def on_save(self, trainer: ReplayTrainer) -> None:
        """Die."""
        if trainer.step == self._after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    "length",
    [
        {"num_train_epochs": 4},
        {"phases": (Phase(num_train_epochs=3), Phase(num_train_epochs=1, learning_rate=1e-3))},
    ],
    ids=["epochs", "phases"],
)
def test_a_run_that_follows_stays_as_long_as_it_began(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path, length: dict[str, Any]
) -> None:
    """Though its cache has more rows by then; and so the learning rate falls as it would have."""
    replay = replace(REPLAY, follow_every_steps=2)
    config = replace(CONFIG, max_steps=-1, lr_scheduler_type="linear", replay=replay, **length)
    rates = []
    for name, dies in (("whole", 0), ("killed", 5)):
        root = tmp_path / name / "cache"
        cache, callback = make_cache(root), Dies(dies, partial(make_cache, root, seed=1))

        def trainer(cache: Cache = cache, name: str = name, heard: Any = callback) -> ReplayTrainer:
            output = tmp_path / name / "out"
            return ReplayTrainer(student_dir, cache, config, output=output, callbacks=[heard])

        if dies:
            with pytest.raises(KeyboardInterrupt):
                trainer().train()
            callback._after = 0
        assert trainer().train().steps == 8
        rates.append(callback.rates)
    assert rates[0] == rates[1]


@pytest.fixture(scope="module")
def begun(
    cache: Cache, student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Outputs of runs that died after their second step, with and without adapters."""
    outputs = {}
    for name, lora in (("plain", None), ("lora", LoraSettings(r=4, alpha=4))):
        outputs[name] = tmp_path_factory.mktemp(name)
        config, places = replace(CONFIG, lora=lora), {"output": outputs[name], "run": "r"}
        made = ReplayTrainer(student_dir, cache, config, callbacks=[Dies(2)], **places)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            made.train()
    return outputs


def resume(cache: Cache, student: Path, output: Path, **changes: Any) -> ReplayTrainer:
    """A trainer that would go on."""
    return ReplayTrainer(student, cache, replace(CONFIG, **changes), output=output, run="r")


@pytest.mark.parametrize(
    ("changes", "expected", "got"),
    [
        ({"learning_rate": 0.1}, "train.learning_rate = 0.01", "train.learning_rate = 0.1"),
        ({"optimizer": "Adam"}, "train.optimizer = 'SGD'", "train.optimizer = 'Adam'"),
        ({"kind": "reverse"}, "train.kind = 'forward'", "train.kind = 'reverse'"),
        ({"max_steps": 9}, "train.max_steps = 3", "train.max_steps = 9"),
        ({"lora": LoraSettings(r=4)}, "train.lora.r = None", "train.lora.r = 4"),
    ],
    ids=str,
)
def test_other_settings_are_refused(
    cache: Cache,
    student_dir: Path,
    begun: dict[str, Path],
    changes: dict[str, Any],
    expected: str,
    got: str,
) -> None:
    with pytest.raises(MismatchError, match="choose another run name or output") as caught:
        resume(cache, student_dir, begun["plain"], **changes)
    assert expected in caught.value.expected
    assert got in caught.value.got


def test_another_base_or_scale_of_adapters_is_refused(
    cache: Cache, student_dir: Path, begun: dict[str, Path], tmp_path: Path
) -> None:
    """Neither shows in the shapes of what a checkpoint holds."""
    student = load_student(inspect_model(str(student_dir)), "float32", torch.device("cpu"))
    with torch.no_grad():
        student.model.model.norm.weight.add_(0.5)
    shutil.copytree(student_dir, tmp_path / "other")
    student.model.save_pretrained(tmp_path / "other")
    lora = LoraSettings(r=4, alpha=4)
    for name, changes in (("plain", {}), ("lora", {"lora": lora})):
        with pytest.raises(MismatchError, match="a run of student"):
            resume(cache, tmp_path / "other", begun[name], **changes)
    with pytest.raises(MismatchError, match=r"lora\.alpha = 4.*got train\.lora\.alpha = 64"):
        resume(cache, student_dir, begun["lora"], lora=replace(lora, alpha=64))


def test_what_only_decides_how_it_runs_may_change(
    cache: Cache, student_dir: Path, begun: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(begun["plain"], tmp_path / "copy")
    changes = {"save_steps": 0, "gradient_checkpointing": True, "loss_bytes": 1 << 22}
    report = resume(cache, student_dir, tmp_path / "copy", **changes).train()
    assert (report.steps, len(report.losses)) == (3, 1)


def test_a_trainer_trains_once(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    made = resume(cache, student_dir, tmp_path)
    made.train()
    with pytest.raises(ConfigError, match="a trainer that has not trained"):
        made.train()


class Stops(Callback):
    """Asks for the end after a step."""

    def __init__(self, after: int, reason: str = "enough") -> None:
        """Which, and why."""
        self._after, self._reason = after, reason

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Ask."""
        if outcome.step == self._after:
            trainer.stop(self._reason)


@pytest.mark.parametrize(("after", "said"), [(2, "enough"), (3, "")])
def test_only_a_run_that_ended_early_says_why(
    cache: Cache, student_dir: Path, tmp_path: Path, after: int, said: str
) -> None:
    made = ReplayTrainer(student_dir, cache, CONFIG, output=tmp_path, callbacks=[Stops(after)])
    report = made.train()
    assert (report.steps, report.stopped) == (after, said)


def test_a_stop_without_a_reason_is_a_stop(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    stops = [Stops(2, reason="")]
    made = ReplayTrainer(student_dir, cache, CONFIG, output=tmp_path, callbacks=stops)
    report = made.train()
    assert (report.steps, report.stopped) == (2, "no reason was given")


class EndsBadly(Callback):
    """Fails at the end."""

    def on_end(self, trainer: ReplayTrainer, report: TrainReport) -> None:
        """Fail."""
        raise StorageError("disk", "room", "none", "Make room.")


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_whose_end_fails_trains_no_step_again(
    cache: Cache, student_dir: Path, tmp_path: Path, every: int
) -> None:
    """Whether its last step was due for a checkpoint or not."""
    config, output = replace(CONFIG, save_steps=every), tmp_path
    made = ReplayTrainer(student_dir, cache, config, output=output, callbacks=[EndsBadly()])
    with pytest.raises(StorageError):
        made.train()
    again = ReplayTrainer(student_dir, cache, config, output=output)
    report = again.train()
    assert (report.steps, report.rows, report.losses) == (3, 18, [])
    assert report.drift["0"]["positions"] == report.positions > 0
    for mine, theirs in zip(again.student.parameters(), made.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_stopped_run_goes_on_from_where_it_stopped(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, save_steps=100)
    for callbacks, steps, taken in (([Stops(2)], 2, 2), ([], 3, 1)):
        heard: list[Callback] = [*callbacks]
        made = ReplayTrainer(student_dir, cache, config, output=tmp_path, callbacks=heard)
        report = made.train()
        assert (report.steps, len(report.losses)) == (steps, taken)
        assert (pin_name(tmp_path, "replay") in active_pins(cache.storage)) == (steps == 2)
    again = ReplayTrainer(student_dir, cache, config, output=tmp_path).train()
    assert (again.losses, again.last_loss) == ([], report.losses[-1])


def test_phases_keep_their_pins_until_the_student_is_published(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    """As the run's own, where the caller gave the snapshot."""
    own, other = make_cache(tmp_path / "own"), make_cache(tmp_path / "other", seed=3)
    phases = (Phase(max_steps=1), Phase(root=str(tmp_path / "other"), max_steps=1))
    config, output = replace(CONFIG, max_steps=-1, phases=phases), tmp_path / "out"
    snapshot = snapshot_for(own, output, "r")
    made = ReplayTrainer(student_dir, own, config, snapshot=snapshot, output=output, run="r")
    made.train()
    assert [len(active_pins(c.storage)) for c in (own, other)] == [1, 1]
    made.release()
    assert [len(active_pins(c.storage)) for c in (own, other)] == [0, 0]
