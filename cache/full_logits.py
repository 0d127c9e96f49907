"""Next-token logits over a teacher's full vocabulary, from one model or from the mixture of
several, for a few positions at a time.

Shapes: B rows, T tokens, P positions, H hidden (of all models), V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from stillroom.cache.causal_lm import head_logits, load_causal_lm, trunk
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.teacher import TeacherConfig


class ModelLogits:
    """One model.

    Args:
        files: its inspected folder.
        dtype: of its weights and products.
        device: where it runs.
    """

    def __init__(self, files: ModelFiles, dtype: str, device: torch.device) -> None:
        """Load the model."""
        self._vocab_size, self._device = files.vocab_size, device
        self._model = load_causal_lm(files, dtype, device)
        self.width: int = self._model.config.get_text_config().hidden_size
        """H."""

    def hidden(self, tokens: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> torch.Tensor:
        """(P, H): the hidden state that predicts each target, which is the one before it.

        Args:
            tokens: of each row, its ids.
            targets: of each row, indices into them, each >= 1.
        """
        input_BT = np.zeros((len(tokens), max(len(t) for t in tokens)), np.int64)
        for row, token in enumerate(tokens):
            input_BT[row, : len(token)] = token
        hidden_BTH = trunk(self._model, torch.from_numpy(input_BT).to(self._device))
        picked = [
            hidden_BTH[b, torch.from_numpy(t - 1).to(self._device)] for b, t in enumerate(targets)
        ]
        return torch.cat(picked)

    def logits(self, hidden_PH: torch.Tensor, temperature: float) -> torch.Tensor:
        """(P, V or more) float32, divided by the temperature; -inf behind the vocabulary."""
        logit_PV = head_logits(self._model, hidden_PH).float() / temperature
        logit_PV[:, self._vocab_size :] = -torch.inf
        return logit_PV


class MixedLogits:
    """Several models of one vocabulary: log sum_i w_i p_i, p_i the softmax of model i.

    Args:
        models: in the order of their shares.
        shares: w_i, which sum to 1.
        vocab_size: ids of the vocabulary.
    """

    def __init__(
        self, models: Sequence[ModelLogits], shares: Sequence[float], vocab_size: int
    ) -> None:
        """Bind them."""
        self._models, self._vocab_size = models, vocab_size
        self._log_shares = [math.log(share) for share in shares]

    def hidden(self, tokens: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> torch.Tensor:
        """(P, H): of all models, side by side; as in `ModelLogits`."""
        return torch.cat([model.hidden(tokens, targets) for model in self._models], -1)

    def logits(self, hidden_PH: torch.Tensor, temperature: float) -> torch.Tensor:
        """(P, V) float32: log probabilities of the mixture, each model at this temperature."""
        widths = [model.width for model in self._models]
        mixed_PV = torch.full(
            (len(hidden_PH), self._vocab_size), -torch.inf, device=hidden_PH.device
        )
        parts = zip(self._models, self._log_shares, torch.split(hidden_PH, widths, -1), strict=True)
        for model, log_share, own_PH in parts:
            logprob_PV = model.logits(own_PH, temperature)[:, : self._vocab_size].log_softmax(-1)
            torch.logaddexp(mixed_PV, logprob_PV.add_(log_share), out=mixed_PV)
        return mixed_PV


def load_logits(
    files: ModelFiles, config: TeacherConfig, device: torch.device
) -> ModelLogits | MixedLogits:
    """Load a teacher's model, or all models of an ensemble.

    Raises:
        InputError: as in `load_causal_lm`.
    """
    models = [ModelLogits(one, config.dtype, device) for one in (files, *files.members)]
    if len(models) == 1:
        return models[0]
    return MixedLogits(models, config.shares(), files.vocab_size)
