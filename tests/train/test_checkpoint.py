"""Checkpoints: whole or refused, and only the newest are kept."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.train.checkpoint import (
    Progressed,
    load_checkpoint,
    newest_checkpoint,
    read_progress,
    save_checkpoint,
)
from stillroom.train.drift import DriftMeter
from tests.fuzz.attempt import attempt
from tests.fuzz.mutate import mutate_bytes, mutate_json

Parts = tuple[torch.nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def progressed_at(step: int) -> Progressed:
    """Where a run stood."""
    drift = {"0": {"n": 3, "log_ratio": 0.5, "ratio": 3.5, "ratio_squared": 4.5}}
    stream = {"sources": [{"snapshot": "0" * 32, "first": 3}]}
    return Progressed(step=step, rows=10, positions=100, stream=stream, drift=drift)


def parts(seed: int) -> Parts:
    """A model that took one step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return model, optimizer, schedule


def save(root: Path, step: int, keep: int = 2) -> Parts:
    """Write one checkpoint."""
    made = parts(step)
    save_checkpoint(root, progressed_at(step), *made, keep)
    return made


def test_round_trip(tmp_path: Path) -> None:
    """Model, optimiser, schedule, generator and progress come back."""
    model, optimizer, schedule = save(tmp_path, 4)
    generator = torch.get_rng_state()
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    other, other_optimizer, other_schedule = parts(9)
    progressed = load_checkpoint(folder, other, other_optimizer, other_schedule)
    assert progressed == progressed_at(4)
    assert torch.equal(other.weight, model.weight)
    assert str(other_optimizer.state_dict()) == str(optimizer.state_dict())
    assert other_schedule.state_dict() == schedule.state_dict()
    assert torch.equal(torch.get_rng_state(), generator)


def test_newest_are_kept(tmp_path: Path) -> None:
    """Older ones go; unfinished folders are not taken for checkpoints."""
    for step in (1, 2, 10):
        save(tmp_path, step)
    (tmp_path / ".step-00000011.abc.tmp").mkdir()
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000010"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000010"
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.pt", "state.json", "complete.json"]
)
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_half_written_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    """A missing or short file is an error that names the folder."""
    save(tmp_path, 1)
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    if damage == "remove":
        (folder / name).unlink()
    else:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        kept = data if damage == "flip" else data[: len(data) // 2]
        (folder / name).write_bytes(kept)
    with pytest.raises(CorruptError, match=r"step-00000001|complete\.json"):
        load_checkpoint(folder, *parts(2))


def test_missing_folder(tmp_path: Path) -> None:
    """A path that is not there is said to be so."""
    with pytest.raises(MissingError, match="checkpoint"):
        load_checkpoint(tmp_path / "none", *parts(2))


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
    meter = DriftMeter(policy_version=3)
    meter.restore(progressed.drift)
    meter.take()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), plain=st.booleans())
def test_any_progress_is_read_or_refused(folder: Path, seed: int, plain: bool) -> None:
    path, rng = folder / "state.json", random.Random(seed)
    sample = jsonfile.dump(asdict(progressed_at(1)))
    path.write_bytes(mutate_bytes(rng, sample) if plain else mutate_json(rng, sample))
    attempt(lambda: resume(folder))
