"""The whole of what trains, from all ranks to the first and back: weights, and what the optimiser
keeps of each. The same whether every rank holds all of it or a shard, so that a run can go on with
another number of ranks.

torch's own gathering takes a step of the optimiser to make its state, and refuses optimisers that
keep none; this reads and writes what is there.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from stillroom.cache.errors import MismatchError
from stillroom.train.ranks import from_first_rank, rank

OTHER_SETTINGS = "Resume with the student, the LoRA settings and the optimiser that it was made by."


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, tied ones once, and buffers that a state keeps, by name.

    Asking for the state first is what puts FSDP's weights back into their shards after a forward.
    """
    kept = model.state_dict().keys()
    named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return named


def gather_model(model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole tensors of `trained_tensors`, on the CPU; every rank calls it, and rank 0 gets them.

    They may share memory with the model: write them before it trains on.
    """
    return dict(_gathered(trained_tensors(model)))


def fill_model(model: torch.nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Put whole tensors, which rank 0 has, into the model of every rank.

    Raises:
        MismatchError: they are of a model with other names or shapes.
    """
    tensors = trained_tensors(model)
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = from_first_rank(lambda: {name: tuple(t.shape) for name, t in whole.items()})
    if mine != theirs:
        differing = sorted(dict(mine.items() ^ theirs.items()))
        first = differing[0]
        raise MismatchError(
            "weights of a checkpoint",
            f"{len(mine)} tensors that train, {first} of shape {mine.get(first, 'none')}",
            f"{len(theirs)}, of shape {theirs.get(first, 'none')}",
            OTHER_SETTINGS,
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(_dealt(whole.get(name), tensor.shape, tensor.dtype, tensor))


def gather_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's groups, with names of parameters, and its whole state of each parameter, on
    the CPU; every rank calls it, and rank 0 gets the states.

    They may share memory with the optimiser: write them before it takes a step.
    """
    names = _names(model)
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {}
    for parameter in _parameters(optimizer):
        kept = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in kept.items() if key not in tensors}
        state[names[parameter]] = {**dict(_gathered(tensors)), **plain}
    return {"groups": groups, "state": state}


def fill_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> None:
    """Put what `gather_optimizer` gave, which rank 0 has, into the optimiser of every rank.

    Raises:
        MismatchError: it is of another optimiser, or of other parameters.
    """
    names = _names(model)
    groups, described = from_first_rank(lambda: (saved["groups"], _described(saved["state"])))
    mine = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    settings = [sorted(group) for group in optimizer.param_groups]
    theirs = [group["params"] for group in groups]
    if mine != theirs or settings != [sorted(group) for group in groups]:
        expected = f"groups of {[len(group) for group in mine]} parameters with {settings[0]}"
        got = f"{[len(group) for group in theirs]}, with {sorted(groups[0]) if groups else 'none'}"
        raise MismatchError("optimiser of a checkpoint", expected, got, OTHER_SETTINGS)
    state: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        name = names[parameter]
        for key, (shape, dtype, value) in described[name].items():
            if shape is not None:
                value = _dealt(
                    saved["state"][name][key] if saved else None, shape, dtype, parameter
                )
            state.setdefault(i, {})[key] = value
    first, numbered = 0, []
    for group in groups:
        numbered.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _names(model: torch.nn.Module) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in trained_tensors(model).items()}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole; only on rank 0."""
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if rank() == 0:
            yield name, whole.cpu().contiguous()


def _described(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor that is dealt; plain values and scalars as they are."""
    return {
        name: {
            key: (tuple(value.shape), value.dtype, None)
            if isinstance(value, Tensor) and value.dim()
            else (None, None, value)
            for key, value in kept.items()
        }
        for name, kept in state.items()
    }


def _dealt(
    whole: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    """A tensor that rank 0 has, on every rank; sharded as `like` is, or copied to each where it has
    another shape."""
    if not dist.is_initialized():
        assert whole is not None
        return whole
    if whole is None:
        whole = torch.empty(shape, dtype=dtype, device=like.device)
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        dist.broadcast(whole, 0)
        return whole
    same = tuple(shape) == tuple(like.shape)
    placements = like.placements if same else [Replicate()] * like.device_mesh.ndim
    return distribute_tensor(whole, like.device_mesh, placements)
