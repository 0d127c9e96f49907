"""A model's output head as plain tensors: weight, bias, scale and soft-cap, with a LoRA on it added
in."""

# Shapes: T positions, H hidden, V logit width.

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillroom.cache.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """What turns hidden states into logits.

    u = scale (W h + bias);   z = cap tanh(u / cap), or u without a cap
    """

    weight: Tensor
    """(V, H) float; with a graph where the head has a LoRA."""
    bias: Tensor | None = None
    """(V,) float."""
    scale: float = 1.0
    """Multiplies the logits, before the soft-cap."""
    soft_cap: float | None = None
    """Logits stay between minus this and this; > 0."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The head of a causal language model, by the maths of `cache.causal_lm.head_logits`.

        A LoRA of peft on the head makes the weight W + B A * scaling, so gradients reach A and B.

        Raises:
            InputError: its head is not one matrix and a bias.
            ConfigError: what peft put on its head is more than one plain LoRA.
        """
        head = model.get_output_embeddings()
        weight, bias = _lora(head) if _is_lora(head) else _linear(head)
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        return cls(
            weight,
            bias,
            (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
            getattr(config, "final_logit_softcapping", None),
        )

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which weight and hidden states are multiplied: autocast's where it is on,
        else the one that both promote to."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        device = hidden.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (T, H): (T, V) float32, float64 for a product of float64.

        Half-precision factors are multiplied as they are and added up in float32. Plain and with
        autograd's gradient: for references and few positions.
        """
        dtype = self.product_dtype(hidden)
        hidden, weight = (x.to(dtype).to(wide(dtype)) for x in (hidden, self.weight))
        bias = None if self.bias is None else self.bias.to(wide(dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden, weight, bias) * self.scale
        if self.soft_cap is None:
            return logits
        return torch.tanh(logits / self.soft_cap) * self.soft_cap


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits of products in `dtype` are computed with: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_lora(head: Any) -> bool:
    return type(head).__module__.startswith("peft.tuners.lora.")


def _linear(head: Any) -> tuple[Tensor, Tensor | None]:
    plain = isinstance(head, torch.nn.Linear) and type(head).forward is torch.nn.Linear.forward
    if not plain or not head.weight.is_floating_point():
        expected = "an output head that is torch.nn.Linear with float weights"
        do = "Load the student unquantised; without its head among peft's modules_to_save."
        raise InputError("output head", expected, type(head).__name__, do)
    return head.weight, cast(Tensor | None, head.bias)


def _lora(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one of peft's LoRA layers, as its forward would use them now."""
    weight, bias = _linear(head.get_base_layer())
    if head.disable_adapters and head.merged:
        do = "Call unmerge_adapter first."
        raise ConfigError("LoRA on the output head", "merged or disabled", "both", do)
    active = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not active:
        return weight, bias
    _refuse_more_than_lora(head, active)
    (name,) = active
    up, down = (side[name].weight.to(weight.dtype) for side in (head.lora_B, head.lora_A))
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight, up, down, alpha=head.scaling[name]), bias


def _refuse_more_than_lora(head: Any, active: list[str]) -> None:
    name = active[0]
    dropout = head.lora_dropout[name]
    refused = {
        f"{len(active)} active adapters": len(active) > 1,
        "dropout": head.training and getattr(dropout, "p", 0.0) > 0,
        "DoRA or another variant": name in head.lora_variant,
        "a bias of its own": head.lora_bias[name],
    }
    for got, present in refused.items():
        if present:
            do = "Set lora_dropout=0, use_dora=False, or leave lm_head out of target_modules."
            raise ConfigError("LoRA on the output head", "one plain LoRA", got, do)
