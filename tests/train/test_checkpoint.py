"""Checkpoints: whole or passed over, never a silent start; a run goes on from them to the bit."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MismatchError, StorageError
from stillroom.train.checkpoint import (
    Progressed,
    load_checkpoint,
    newest_checkpoint,
    read_progress,
    save_checkpoint,
)
from stillroom.train.drift import DriftCallback
from tests.fuzz.attempt import attempt
from tests.fuzz.mutate import mutate_bytes, mutate_json

Parts = tuple[torch.nn.Sequential, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
FILES = ("model.safetensors", "training.pt", "state.json", "complete.json")


def progressed_at(step: int) -> Progressed:
    """Where a run stood."""
    sums = {
        "positions": 3,
        "student_tail": 0.5,
        "teacher_tail": 0.25,
        "outside": 1,
        "n": 3,
        "log_ratio": 0.0,
        "log_ratio_squared": 0.0,
        "ratio": 3.0,
        "ratio_log_ratio": 0.0,
        "ratio_squared": 3.0,
        "rows": 1,
        "row_ratio": 1.0,
        "row_ratio_squared": 1.0,
    }
    stream = {"sources": [{"snapshot": "0" * 32, "first": 3}]}
    callbacks = {"drift": {"id": "0" * 16, "sums": {"0": sums}, "last": {}}}
    return Progressed(
        step=step,
        rows=10,
        positions=100,
        loss=0.5,
        stream=stream,
        callbacks=callbacks,
        student="f" * 32,
        settings={"train.learning_rate": 0.1},
    )


def parts(seed: int, optimizer: str = "AdamW", frozen: bool = False) -> Parts:
    """A tied model that took one step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)
    )
    model[2].weight = model[0].weight
    if frozen:
        model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = getattr(torch.optim, optimizer)(trained, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(made, 1, 0.5)
    take_step((model, made, schedule))
    return model, made, schedule


def take_step(made: Parts) -> None:
    """One step on random input."""
    model, optimizer, schedule = made
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    schedule.step()


def save(root: Path, step: int, keep: int = 2, **settings: Any) -> Parts:
    """Write one checkpoint."""
    made = parts(step, **settings)
    save_checkpoint(root, progressed_at(step), *made, keep)
    return made


def damage(folder: Path, name: str, how: str) -> None:
    """Remove, cut or change a file."""
    if how == "remove":
        (folder / name).unlink()
    else:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data if how == "flip" else data[: len(data) // 2])


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad", "RMSprop", "Adafactor", "ASGD"])
@pytest.mark.parametrize("frozen", [False, True])
def test_goes_on_to_the_bit(tmp_path: Path, optimizer: str, frozen: bool) -> None:
    """Model with its buffers, optimiser (some keep no state), schedule, all generators."""
    made = save(tmp_path, 4, optimizer=optimizer, frozen=frozen)
    first = [random.random(), np.random.rand(), float(torch.rand(()))]
    take_step(made)
    other = parts(9, optimizer=optimizer, frozen=frozen)
    if frozen:
        other[0][0].load_state_dict(made[0][0].state_dict())
    assert load_checkpoint(tmp_path, *other) == progressed_at(4)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == first
    take_step(other)
    for mine, theirs in zip(
        made[0].state_dict().values(), other[0].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert other[0][2].weight is other[0][0].weight
    assert str(made[1].state_dict()) == str(other[1].state_dict())
    assert made[2].state_dict() == other[2].state_dict()


def test_only_what_trains_is_stored(tmp_path: Path) -> None:
    save(tmp_path, 1, frozen=True)
    weights = load_file(tmp_path / "step-00000001" / "model.safetensors")
    norm = [f"1.{name}" for name in ("bias", "weight", *BUFFERS)]
    assert sorted(weights) == sorted([*norm, "2.bias"])


def test_newest_are_kept(tmp_path: Path) -> None:
    """Older ones go; what a killed process left unfinished is no checkpoint, and goes too."""
    for step in (1, 2, 10):
        save(tmp_path, step)
    unfinished = tmp_path / ".0123abc.tmp"
    unfinished.mkdir()
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000010"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000010"
    assert not unfinished.exists()
    (tmp_path / "first" / ".4567def.tmp").mkdir(parents=True)
    assert newest_checkpoint(tmp_path / "first") is None, "killed while it wrote its first one"
    assert not list((tmp_path / "first").iterdir())
    assert newest_checkpoint(tmp_path / "none") is None
    assert load_checkpoint(tmp_path / "none", *parts(2)) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["remove", "truncate", "flip"])
def test_the_one_before_a_damaged_one_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    """That is said once; the damaged one is kept aside, and its step is saved anew."""
    made = save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002", name, how)
    other = parts(7)
    assert load_checkpoint(tmp_path, *other) == progressed_at(1)
    assert torch.equal(other[0].state_dict()["0.weight"], made[0].state_dict()["0.weight"])
    said = capsys.readouterr().err
    assert "resuming from step-00000001" in said
    assert "step-00000002 is damaged" in said
    assert (name if name != "complete.json" else "complete") in said
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]
    (aside,) = tmp_path.glob("damaged-step-00000002-*")
    assert (aside / "state.json").is_file() or (name, how) == ("state.json", "remove")
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path, *parts(7)) == progressed_at(2)
    assert capsys.readouterr().err == ""


def test_none_whole_is_no_silent_start(tmp_path: Path) -> None:
    """An error, as often as it is tried; nothing is renamed or removed."""
    for step in (1, 2):
        save(tmp_path, step)
        damage(tmp_path / f"step-{step:08d}", "training.pt", "truncate")
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"a whole checkpoint; got 2 that are damaged"):
            load_checkpoint(tmp_path, *parts(7))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    blocked = tmp_path / "step-00000001" / "model.safetensors"
    with pytest.raises(StorageError, match="to write a folder"):
        save_checkpoint(blocked, progressed_at(2), *parts(2), 1)
    assert load_checkpoint(tmp_path, *parts(3)) == progressed_at(1)


@pytest.mark.parametrize("other", [{"optimizer": "SGD"}, {"frozen": True}])
def test_another_student_or_optimiser_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """With what does not fit, and before a step is taken."""
    save(tmp_path, 1)
    with pytest.raises(MismatchError, match="of a checkpoint: expected"):
        load_checkpoint(tmp_path, *parts(2, **other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose progress is to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    save(root, 1)
    return root / "step-00000001"


def resume(folder: Path) -> None:
    """Read all that a run takes from its progress, but for the stream's own state."""
    progressed = read_progress(folder)
    assert type(progressed.step) is type(progressed.rows) is type(progressed.positions) is int
    assert type(progressed.stream["sources"][0]["snapshot"]) is str
    callback = DriftCallback()
    callback.load_state_dict(progressed.callbacks.get("drift", {}))
    callback.state_dict()
    callback._meter.take(3)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), plain=st.booleans())
def test_any_progress_is_read_or_refused(folder: Path, seed: int, plain: bool) -> None:
    path, rng = folder / "state.json", random.Random(seed)
    sample = jsonfile.dump(asdict(progressed_at(1)))
    path.write_bytes(mutate_bytes(rng, sample) if plain else mutate_json(rng, sample))
    attempt(lambda: resume(folder))
