"""What trains, gathered and put back; several ranks are tested where they are launched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from stillroom.cache.errors import MismatchError
from stillroom.train.full_state import (
    fill_model,
    fill_optimizer,
    gather_model,
    gather_optimizer,
    trained_tensors,
)


def model(width: int = 3) -> torch.nn.Sequential:
    """Two tied layers, a frozen one, and buffers of which one is not kept."""
    made = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(3)))
    made[1].weight = made[0].weight
    made[2].requires_grad_(False)
    made.register_buffer("kept", torch.ones(2))
    made.register_buffer("made_anew", torch.ones(2), persistent=False)
    return made


def test_tied_once_frozen_not() -> None:
    assert trained_tensors(model()).keys() == {"0.weight", "0.bias", "1.bias", "kept"}


def test_weights_of_another_shape_or_name() -> None:
    """The first that differs is named; nothing is changed."""
    made, whole = model(), gather_model(model(4))
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(MismatchError, match=r"0\.bias of shape \(3,\); got 4, of shape \(4,\)"):
        fill_model(made, whole)
    with pytest.raises(MismatchError, match="kept of shape"):
        fill_model(made, {n: t for n, t in gather_model(made).items() if n != "kept"})
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def optimizer(made: torch.nn.Module, cls: Any = torch.optim.AdamW, **args: Any) -> Any:
    """One of two groups that differ in a setting."""
    parameters = [p for p in made.parameters() if p.requires_grad]
    return cls([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.1, **args)


def step(made: torch.nn.Module, taken: Any) -> None:
    """A step on a fixed input."""
    taken.zero_grad()
    made(torch.ones(2, 3)).square().sum().backward()
    taken.step()


def test_groups_keep_their_settings() -> None:
    """And their states; parameters are told by name."""
    first, second = model(), model()
    taken, other = optimizer(first), optimizer(second)
    step(first, taken)
    taken.param_groups[1]["lr"] = 0.25
    fill_model(second, gather_model(first))
    second[2].load_state_dict(first[2].state_dict())
    fill_optimizer(second, other, copy.deepcopy(gather_optimizer(first, taken)))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.25]
    for made, used in ((first, taken), (second, other)):
        step(made, used)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_another_optimizer_is_refused() -> None:
    made = model()
    saved = gather_optimizer(made, optimizer(made))
    with pytest.raises(MismatchError, match="optimiser of a checkpoint"):
        fill_optimizer(made, optimizer(made, torch.optim.SGD), saved)
    one_group = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad])
    with pytest.raises(MismatchError, match="groups of"):
        fill_optimizer(made, one_group, saved)
