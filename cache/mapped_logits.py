"""A teacher's logits in the order of a student's ids, and the rest that the student has no token
for.

Shapes: P positions, H hidden, V the teacher's vocabulary, S the student's.
"""

from collections.abc import Sequence

import numpy as np
import torch

from stillroom.cache.full_logits import MixedLogits, ModelLogits
from stillroom.cache.id_map import IdMap


class MappedLogits:
    """Logits by the ids that a cache holds.

    Args:
        logits: the teacher's.
        id_map: to the teacher's ids; None where they are the same.
        device: where the logits are.
    """

    def __init__(
        self, logits: ModelLogits | MixedLogits, id_map: IdMap | None, device: torch.device
    ) -> None:
        """Move the map to the device."""
        self._logits, self._map = logits, id_map
        if id_map is not None:
            self._own, self._other = (
                torch.from_numpy(ids.astype(np.int64)).to(device)
                for ids in (id_map.teacher_id, id_map.teacher_only)
            )

    def hidden(self, tokens: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> torch.Tensor:
        """(P, H), as in `full_logits.ModelLogits`; the tokens are the cache's."""
        if self._map is not None:
            tokens = [self._map.to_teacher(token) for token in tokens]
        return self._logits.hidden(tokens, targets)

    def logits(
        self, hidden_PH: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (P, S), and logsumexp (P, 1) of those that are none of the student's tokens; None
        where all are."""
        logit_PV = self._logits.logits(hidden_PH, temperature)
        if self._map is None:
            return logit_PV, None
        rest_P1 = None
        if len(self._other):
            rest_P1 = logit_PV[:, self._other].logsumexp(-1, keepdim=True)
        return logit_PV[:, self._own], rest_P1
