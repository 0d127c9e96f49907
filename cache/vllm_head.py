"""A model's output head alone, for hidden states that another engine computes: its weights, scale
and soft-cap, without a second copy of the model.

Shapes: P positions, H hidden, V logit width.
"""

from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as hf_logging

from stillroom.cache.causal_lm import HEAD_TOLERANCE, PROBE_TOKENS, head_logits
from stillroom.cache.errors import InputError, first_line
from stillroom.cache.fingerprint import ModelFiles, tensors_of

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""What a head is stored in; others need a scale beside them."""


class OutputHead:
    """The head of a model whose folder was inspected.

    Args:
        files: the folder.
        dtype: of its weights and product.
        device: where it is.

    Raises:
        InputError: its weights are not found, or it is more than a product, a scale and a soft-cap.
    """

    def __init__(self, files: ModelFiles, dtype: str, device: torch.device) -> None:
        """Load the head's weights, and nothing else."""
        self._vocab_size, self._dtype = files.vocab_size, getattr(torch, dtype)
        self.device = device
        self._model = _without_weights(files, self._dtype)
        head: Any = self._model.get_output_embeddings()
        names = [name for name, _ in head.named_parameters()]
        state = {name: _stored(self._model, head, name, files) for name in names}
        moved = {name: tensor.to(device, self._dtype) for name, tensor in state.items()}
        try:
            head.load_state_dict(moved, assign=True)
        except RuntimeError as error:
            raise _unusable(files, " ".join(str(error).split())) from error
        _check_whole(self._model, head, files)

    @torch.inference_mode()
    def logits(self, hidden_PH: torch.Tensor, temperature: float) -> tuple[torch.Tensor, None]:
        """(P, V) float32, divided by the temperature and -inf behind the vocabulary; and that there
        is no other token."""
        logit_PV = head_logits(self._model, hidden_PH.to(self._dtype)).float() / temperature
        logit_PV[:, self._vocab_size :] = -torch.inf
        return logit_PV, None


def _without_weights(files: ModelFiles, dtype: torch.dtype) -> Any:
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unusable(files, first_line(error)) from error
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise _unusable(files, type(head).__name__)
    return model.eval()


def _stored(model: Any, head: torch.nn.Module, name: str, files: ModelFiles) -> torch.Tensor:
    """A parameter of the head from the model's files, where it may stand under the name of what it
    is tied to."""
    prefix = next(prefix for prefix, module in model.named_modules() if module is head)
    own = f"{prefix}.{name}"
    stored = tensors_of(files.folder)
    found = next((n for n in (model.all_tied_weights_keys.get(own), own) if n in stored), None)
    if found is None:
        raise _unusable(files, f"no tensor {own}")
    with safe_open(stored[found][0], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(found)
    if tensor.dtype not in PLAIN:
        raise _unusable(files, f"{found} of {tensor.dtype}")
    module = found.removesuffix(name)
    scale = next((n for n in stored if n.startswith(module) and "scale" in n[len(module) :]), None)
    if scale is not None:
        raise _unusable(files, f"{found} with {scale}")
    return tensor


@torch.inference_mode()
def _check_whole(model: Any, head: torch.nn.Linear, files: ModelFiles) -> None:
    """What the model's own forward makes of hidden states must be what `head_logits` makes of
    them; its trunk, which has no weights here, gives made-up ones meanwhile."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1, PROBE_TOKENS, head.in_features, generator=generator)
    hidden: Any = drawn.to(head.weight.device, head.weight.dtype)
    trunk = model.base_model
    trunk.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=hidden.device)
        whole = model(input_ids=ids, use_cache=False).logits.float()
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise _unusable(files, f"{type(model).__name__}: {first_line(error)}") from error
    finally:
        del trunk.forward
    difference = (whole - head_logits(model, hidden).float()).abs().max().item()
    if not difference <= HEAD_TOLERANCE * max(1.0, whole.abs().max().item()):
        raise _unusable(files, f"{type(model).__name__}, whose logits differ by {difference:.3g}")


def _unusable(files: ModelFiles, got: str) -> InputError:
    expected = "an output head that is one matrix, a scale and a soft-cap, stored as plain numbers"
    do = "Take the backend transformers, or leave teacher.exact_tail out if it is set."
    return InputError(str(files.folder), expected, got, do)
