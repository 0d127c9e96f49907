"""A model's forward on one process or on several that train it together, and what those must agree
on before they start.

Each of several processes holds the whole model (`ddp`, DistributedDataParallel), or weights,
gradients and the optimiser's state are shared out among them (`fsdp`, FSDP2: a unit a decoder
layer, and one for the rest). The model stays what it was: its parameters keep their names.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from stillroom.cache.errors import InputError
from stillroom.train.ranks import from_first_rank, join_ranks


def same_on_all_ranks(choose: Callable[[], Any], device: str) -> Any:
    """Let rank 0 choose, and give its choice to every rank.

    Args:
        choose: called on rank 0 only; returns something that pickles.
        device: the setting, auto or cpu.

    Raises:
        Exception: whatever `choose` raised, on every rank.
    """
    join_ranks(device)
    return from_first_rank(choose)


class Parallel:
    """Runs functions of a model inside its forward, so that gradients are reduced over ranks and,
    with fsdp, the weights are whole while the function runs.

    Gradients are means over ranks: multiply a loss by `world` to have their sum. They have the
    weights' dtype, and with bf16 are reduced in float32.

    Args:
        model: with its final parameters, on its device; to be sharded it may be in main memory.
            Its forward runs functions from now on; given anything else it is what it was.
        how: ddp, fsdp, or auto (ddp). One process alone needs neither.
        bf16: with fsdp, let weights travel and multiply in bfloat16; they stay in their own dtype
            where they are shared out.
        device: where a sharded model goes, a unit at a time, so that no device ever holds all of
            it; this process's current one of its type. None: where it is.

    Raises:
        InputError: fsdp, and the model has no list of decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        how: str = "auto",
        *,
        bf16: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Wrap it; of several processes each calls this."""
        self.model = model
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.kind = "none" if self.world == 1 else {"auto": "ddp"}.get(how, how)
        self.units = 0
        """Units that were sharded."""
        vars(model)["forward"] = _Forward(model)
        self._wrapped: torch.nn.Module = model
        if self.kind == "ddp":
            self._wrapped = DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        elif self.kind == "fsdp":
            self.units = _shard(model, bf16, model.device if device is None else device)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result, computed inside the model's forward.

        Args:
            function: returns a tensor, or a tuple (named or not) of tensors. Of several ranks, each
                calls as many functions in its turn.
            args: its arguments.
        """
        return self._wrapped(function, *args)

    @contextmanager
    def reducing(self, last: bool) -> Iterator[None]:
        """A forward and a backward whose gradients stay on this rank unless they are the `last` of
        a step, with which those of all are reduced. With fsdp whole gradients are held until
        then."""
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
            return
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        yield

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def clip_gradients(self, most: float) -> float:
        """Scale gradients down to a norm of at most `most`; returns the norm before, over all
        parameters and shards."""
        norm = clip_grad_norm_(list(self.model.parameters()), most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's whole state on the CPU, by its own names, on rank 0, and nothing on others.
        Every rank calls it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if self.kind == "fsdp":
            return cast(dict[str, torch.Tensor], get_model_state_dict(self.model, options=options))
        state = self.model.state_dict() if self.rank == 0 else {}
        return {name: tensor.cpu() for name, tensor in state.items()}


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The model's decoder layers.

    Raises:
        InputError: there is no list of as many modules as its configuration says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    do = "Train with parallel ddp and without torch_compile."
    raise InputError(type(model).__name__, f"a list of {count} decoder layers", "none", do)


class _Forward:
    """A model's forward, or a function in its place: no model takes one as its first argument.

    It does not keep the model, so that this is freed at once when nobody else does.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Keep the signature too, by which transformers checks arguments of `generate`."""
        self._model = weakref.ref(model)
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with what follows it, or the forward of the model's class."""
        if args and callable(args[0]):
            return args[0](*args[1:])
        model: Any = self._model()
        return type(model).forward(model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has one of its own."""
        return _Forward, (self._model(),)


def _shard(model: PreTrainedModel, bf16: bool, device: torch.device) -> int:
    layers, name = decoder_layers(model), type(model).__name__
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    if units != len(layers) + 1 or not all(isinstance(p, DTensor) for p in model.parameters()):
        expected, got = f"{len(layers) + 1} units with all parameters in them", f"{units}"
        raise InputError(name, expected, got, "Train with parallel ddp.")
    return units
