"""A Hugging Face causal language model taken apart into trunk and head, so that T x V logits are
never held.

Shapes: T tokens, H hidden, V logit width.
"""

import math
import os
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from stillroom.cache.errors import ConfigError, InputError, first_line
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.model_memory import check_fits

PROBE_TOKENS = 8
HEAD_TOLERANCE = 0.05
CAUSAL_TOLERANCE = 0.05
"""Rounding that a later token may cause, of a channel's largest value, in the middle channel. Where
tokens read what comes later, it is about 1."""


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one, else the CPU. Of several processes
    that torchrun or Slurm started on a node, each takes the GPU of its local rank.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = first_line(error)
        raise ConfigError(
            "device", "one of this machine, or auto", f"{name!r}: {cause}", "Use auto."
        ) from error
    return device


def load_causal_lm(files: ModelFiles, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a model whose folder was inspected; in eval mode.

    Raises:
        InputError: there is not memory enough, weights are missing or do not fit, its head cannot
            be separated from its trunk, or it reads what comes after a token too.
    """
    check_fits(files, dtype, device)
    hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        cause = first_line(error)
        do = "Save the model again with save_pretrained."
        raise InputError(str(files.folder), "a causal language model", cause, do) from error
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        got = f"{len(missing)} missing or of another shape, such as {missing[0]}"
        raise InputError(
            str(files.folder), "weights for every tensor", got, "Save the model again."
        )
    model = cast(PreTrainedModel, model.to(device).eval())
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # transformers' fused attention leaves the cap out
    _check_head(model, files)
    _check_causal(model, files)
    return model


def trunk(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Last hidden states (B, T, H), after the final norm.

    Raises:
        InputError: the architecture has no trunk that gives them.
    """
    output = model.base_model(input_ids=input_ids, use_cache=False, **kwargs)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        expected, got = "a trunk that gives last hidden states", type(output).__name__
        do = "This architecture is not supported yet."
        raise InputError(type(model).__name__, expected, got, do)
    return cast(torch.Tensor, hidden)


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of hidden states (..., H), with the model's own scale and soft-cap."""
    head = model.get_output_embeddings()
    assert head is not None
    logits: torch.Tensor = head(hidden)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _check_head(model: PreTrainedModel, files: ModelFiles) -> None:
    """Trunk and head must give what the whole model gives, or an architecture does more than we
    know."""
    ids = _probe_ids(model, files)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.float()
        ours = head_logits(model, trunk(model, ids)).float()
    difference = (whole - ours).abs().max().item()
    if math.isfinite(difference) and difference > HEAD_TOLERANCE * max(
        1.0, whole.abs().max().item()
    ):
        raise InputError(
            str(files.folder),
            "an output head that is one matrix, a scale and a soft-cap",
            f"logits that differ by {difference:.3g} ({type(model).__name__})",
            "This architecture is not supported yet.",
        )


def _check_causal(model: PreTrainedModel, files: ModelFiles) -> None:
    """No token may change what is computed before it. Each channel of the hidden states is measured
    by itself, as single ones may be thousands of times larger; what is not finite in both tells
    nothing, and is refused where rows are scored."""
    ids = _probe_ids(model, files)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + files.vocab_size // 2) % files.vocab_size
    with torch.no_grad():
        first_TH, second_TH = (trunk(model, each)[0, :-1].float() for each in (ids, other))
    told_H = (first_TH.isfinite() | second_TH.isfinite()).all(0)
    change_H = (first_TH - second_TH)[:, told_H].abs().nan_to_num(math.inf).amax(0)
    size_H = first_TH[:, told_H].nan_to_num(0.0, 0.0, 0.0).abs().amax(0)
    if (change_H > CAUSAL_TOLERANCE * size_H).sum() * 2 > told_H.sum():
        raise InputError(
            str(files.folder),
            "a causal language model",
            f"hidden states that follow later tokens too ({type(model).__name__})",
            "Choose a model that predicts the next token.",
        )


def _probe_ids(model: PreTrainedModel, files: ModelFiles) -> torch.Tensor:
    """(1, PROBE_TOKENS) ids from all over the vocabulary: the first ones are often of tokens that
    were never trained, and all alike."""
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] * files.vocab_size
    return (ids + files.vocab_size // 3) // PROBE_TOKENS % files.vocab_size
