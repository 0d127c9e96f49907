"""The best student: kept whole, put back to the bit, refused where damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillroom.cache.errors import CorruptError
from stillroom.train.best import best_of, keep_only, load_best, save_best


def model(seed: int) -> torch.nn.Sequential:
    """A model of which a part is frozen."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    made[0].requires_grad_(False)
    return made


def test_round_trip_and_what_is_kept(tmp_path: Path) -> None:
    """What trains comes back; what is frozen stays."""
    root = best_of(tmp_path, "r")
    for step in (1, 2, 3):
        save_best(root, step, model(step))
    (root / ".abc.tmp").mkdir()
    keep_only(root, {2, 3, -1})
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    other = model(9)
    load_best(root, 2, other)
    for name, seed in (("0.weight", 9), ("1.weight", 2)):
        assert torch.equal(other.state_dict()[name], model(seed).state_dict()[name])


@pytest.mark.parametrize("how", ["gone", "flip"])
def test_damaged_or_gone(tmp_path: Path, how: str) -> None:
    root = best_of(tmp_path, "r")
    save_best(root, 1, model(1))
    path = root / "step-00000001" / "model.safetensors"
    if how == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"step-0000000.*train\.load_best_model_at_end to false"):
        load_best(root, 1 if how == "flip" else 2, model(2))
