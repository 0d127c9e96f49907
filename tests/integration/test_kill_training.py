"""Training that is killed at any point, also inside a checkpoint, goes on to the losses and weights
of an unbroken run, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.store import Cache
from tests.integration.test_kill import Runner
from tests.train.event_files import points

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 12
TRAIN: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "device": "cpu",
    "drift_every_steps": 5,
    "save_steps": 2,
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "replay": {"batch_rows": 3, "max_tokens": 256, "block_rows": 2, "window_rows": 4},
}
KINDS: dict[str, dict[str, Any]] = {
    "weights": {},
    "adapters with dropout": {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}, "learning_rate": 5e-2},
}


def die(call: str, match: str = "", nth: int = 1, when: str = "before") -> dict[str, Any]:
    """Die at a call of a function."""
    return {"call": call, "match": match, "nth": nth, "when": when}


CHECKPOINTS = r"/checkpoints/r/"
BEST = r"/best/r/"
POINTS = {
    "before the first checkpoint": die("step", nth=2),
    "right after a checkpoint": die("step", nth=5),
    "steps after a checkpoint": die("step", nth=8),
    "before its weights": die("save_file", CHECKPOINTS, 2),
    "between weights and optimiser": die("save_file", CHECKPOINTS, 2, "after"),
    "between optimiser and progress": die("torch.save", CHECKPOINTS, 3, "after"),
    "all files but the seal": die("seal_folder", CHECKPOINTS, 3),
    "sealed, not renamed": die("rename", CHECKPOINTS, 3),
    "renamed, older ones are there": die("rename", CHECKPOINTS, 3, "after"),
    "before an older one is removed": die("rmtree", CHECKPOINTS + "step-"),
    "while an older one is removed": die("unlink", r"training\.pt", 1, "after"),
    "best student half written": die("save_file", BEST, 2, "after"),
    "best student written, not in a checkpoint": die("rename", BEST, 2, "after"),
    "trained, not ended": die("step", nth=STEPS, when="after"),
}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One for all tests here."""
    made = Runner()
    yield made
    made.close()


Request = Callable[[Path, str], dict[str, Any]]


@pytest.fixture(scope="module")
def request_of(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Request:
    """Makes what a runner is asked for: a root with an output folder."""
    root, held = (tmp_path_factory.mktemp("caches") / name for name in ("root", "held"))
    make_cache(root)
    make_cache(held, rows=5, seed=7)

    def make(output: Path, kind: str) -> dict[str, Any]:
        return {
            "settings": {
                "output": str(output),
                "train": {**TRAIN, "eval_root": str(held), **KINDS[kind]},
            },
            "train": {"root": str(root), "student": str(student_dir)},
        }

    return make


def losses(output: Path) -> dict[int, set[str]]:
    """All losses that any process had at each step."""
    found: dict[int, set[str]] = {}
    for line in (output / "losses.jsonl").read_text().splitlines():
        value = json.loads(line)
        found.setdefault(value["step"], set()).add(value["loss"])
    return found


def ended(output: Path) -> Any:
    """What the last process left at its end."""
    return json.loads((output / "ended.json").read_text())


@pytest.fixture(scope="module")
def unbroken(
    runner: Runner, request_of: Request, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Outputs of runs that nobody disturbs."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp("unbroken") / "out"
        assert runner.ask(request_of(made[kind], kind)) == 0
        found = losses(made[kind])
        assert len(found) == STEPS
        assert all(len(values) == 1 for values in found.values())
        assert len(set.union(*found.values())) == STEPS
    return made


def check_equal(output: Path, expected: Path) -> None:
    """The same losses at every step, also at those that were taken twice, curves without a step
    that is in them twice, and the same end."""
    assert losses(output) == losses(expected)
    mine, theirs = (points(folder / "tensorboard" / "r") for folder in (output, expected))
    assert mine["loss_nats"] == theirs["loss_nats"]
    assert len(mine["loss_nats"]) == STEPS
    assert {name: [*steps] for name, steps in mine.items()} == {
        name: [*steps] for name, steps in theirs.items()
    }
    assert ended(output) == ended(expected)
    for folder in ("checkpoints/r", "best/r"):
        left = {path.name for path in (output / folder).iterdir()}
        assert left == {path.name for path in (expected / folder).iterdir()}
    assert f"step-{ended(expected)['student_step']:08d}" in left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POINTS)
def test_killed_training_goes_on_to_the_bit(
    runner: Runner,
    request_of: Request,
    unbroken: dict[str, Path],
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    request = request_of(tmp_path / "out", kind)
    assert runner.ask(request, POINTS[name]) == signal.SIGKILL
    assert runner.ask(request) == 0
    check_equal(tmp_path / "out", unbroken[kind])


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "state.json"])
def test_a_cut_checkpoint_is_passed_over(
    runner: Runner, request_of: Request, unbroken: dict[str, Path], tmp_path: Path, file: str
) -> None:
    """Killed after its fourth checkpoint, which is then cut: it goes on from the third,
    says so, and ends the same."""
    output = tmp_path / "out"
    request = request_of(output, "weights")
    assert runner.ask(request, die("step", nth=9)) == signal.SIGKILL
    newest = output / "checkpoints" / "r" / "step-00000008" / file
    data = newest.read_bytes()
    newest.write_bytes(data[: len(data) // 2])
    assert runner.ask(request) == 0
    said = output.with_suffix(".log").read_text()
    assert "resuming from step-00000006, as step-00000008 is damaged" in said
    (damaged,) = (output / "checkpoints" / "r").glob("damaged-step-00000008-*")
    assert (damaged / file).stat().st_size == len(data) // 2
    damaged.rename(tmp_path / "aside")
    check_equal(output, unbroken["weights"])


def test_all_checkpoints_cut_is_an_error(
    runner: Runner, request_of: Request, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    request = request_of(output, "weights")
    assert runner.ask(request, die("step", nth=5)) == signal.SIGKILL
    for path in (output / "checkpoints" / "r").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    steps = (output / "losses.jsonl").read_text()
    with pytest.raises(AssertionError, match="expected a whole checkpoint; got 2 that are damaged"):
        runner.ask(request)
    assert (output / "losses.jsonl").read_text() == steps
