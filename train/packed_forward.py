"""A model's forward over packed segments, and the check that rows are there what they are alone.

Shapes: T tokens, H hidden.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from stillroom.cache.causal_lm import trunk
from stillroom.cache.errors import StillroomError, first_line
from stillroom.train.attention import NAME
from stillroom.train.segments import Segments
from stillroom.train.small_copy import VOCAB, small_copy

TOLERANCE = 1e-3  # of the hidden states' norm: room for float32, not for other maths
HALF_TOLERANCE = 0.05  # the same, for half precision
LEAK_TOLERANCE, LEAK_ROUNDINGS = 0.01, 100
"""What other rows may change, as a part of the norm, and in epsilons: nothing, but in mixtures of
experts, whose matrix products get other shapes."""
SHORT, LONG = (3, 6, 6), (10, 40, 14)
"""Tokens of two rows' common prompt, and of each row: for a model as it is, and for a small copy,
whose windows and the like they exceed; one row is longer than it was trained for, one is not."""


def packed_hidden(
    model: PreTrainedModel, token: torch.Tensor, position: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """(T, H) last hidden states of packed segments; `token` and `position` are (T,) int64.

    Kernels of layers with a state take the boundaries as `cu_seq_lens_q`, where they take any.
    """
    bounds = {"cu_seq_lens_q": segments.edge, "cu_seq_lens_k": segments.edge}
    longest = {"max_length_q": segments.longest, "max_length_k": segments.longest}
    known = {} if segments.shares else bounds | longest
    hidden = trunk(model, token[None], position_ids=position[None], segments=segments, **known)
    return hidden[0]


def why_not_packed(model: PreTrainedModel, vocab_size: int) -> tuple[str, str]:
    """Why rows of a model cannot be packed, and why packed ones cannot share a prompt.

    Tried with the model, and with a small random copy whose windows, chunks and compression begin
    within the rows, and none of whose weights are zero. An error is a reason too. The model keeps
    its attention.

    Returns:
        Two reasons, each empty if there is none.
    """
    found = _Probe(model, vocab_size, SHORT).reasons()
    if found[0]:
        return found
    try:
        small = small_copy(model)
    except Exception as error:
        why = f"no small {type(model).__name__} can be made to try it: {_cause(error)}"
        return why, why
    one_row, unshared = _Probe(small, VOCAB, LONG).reasons()
    return one_row, one_row or found[1] or unshared


class _Probe:
    """Two rows with a common prompt, through one model."""

    def __init__(
        self, model: PreTrainedModel, vocab_size: int, sizes: tuple[int, int, int]
    ) -> None:
        self._model, self._name, device = model, type(model).__name__, model.device
        self._prompt, *self._lengths = sizes
        numbered = [torch.arange(size, device=device) for size in self._lengths]
        self._rows = [(row + 3 + i) % vocab_size for i, row in enumerate(numbered)]
        self._rows[1][: self._prompt] = self._rows[0][: self._prompt]

    @torch.no_grad()
    def reasons(self) -> tuple[str, str]:
        """As `why_not_packed`, of this model alone."""
        own = self._model.config._attn_implementation
        try:
            self._alone = [trunk(self._model, row[None])[0] for row in self._rows]
            self._model.set_attn_implementation(NAME)
            one_row = self._why_one_row()
        except Exception as error:
            one_row = f"{self._name} cannot read packed rows: {_cause(error)}"
        try:
            unshared = one_row or self._unlike("rows with a shared prompt", self._sharing())
        except Exception as error:
            unshared = f"{self._name} cannot read a shared prompt: {_cause(error)}"
        self._model.set_attn_implementation(own)
        return one_row, unshared

    def _why_one_row(self) -> str:
        if not all(bool(hidden.isfinite().all()) for hidden in self._alone):
            return f"hidden states of {self._name} are not finite"
        first, second = self._rows
        one, other = (self._packed([row, second]) for row in (first, first.flip(0)))
        roundings = LEAK_ROUNDINGS * torch.finfo(one[1].dtype).eps
        if not _gap(one[1], other[1]) <= min(LEAK_TOLERANCE, roundings):
            return f"packed rows of {self._name} see one another"
        return self._unlike("packed rows", one)

    def _unlike(self, kind: str, found: list[torch.Tensor]) -> str:
        """How rows are not what they are alone, if so."""
        for row, alone in zip(found, self._alone, strict=True):
            tolerance = TOLERANCE if row.dtype.itemsize > 2 else HALF_TOLERANCE
            gap = _gap(row, alone)
            if not gap <= tolerance:
                return f"{kind} of {self._name} differ by {gap:.2g} from what they are alone"
        return ""

    def _packed(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Last hidden states (T, H) of two rows, packed."""
        position = torch.cat([torch.arange(len(row), device=row.device) for row in rows])
        return list(torch.split(self._hidden(rows, position, [-1, -1]), self._lengths))

    def _sharing(self) -> list[torch.Tensor]:
        """The same of rows whose prompt is shared."""
        cut, (first, second) = self._prompt, self._rows
        after = [torch.arange(cut, size, device=first.device) for size in self._lengths]
        position = torch.cat([torch.arange(cut, device=first.device), *after])
        pieces = [first[:cut], first[cut:], second[cut:]]
        hidden = self._hidden(pieces, position, [-1, 0, 0])
        prompt, *rest = torch.split(hidden, [len(piece) for piece in pieces])
        return [torch.cat([prompt, row]) for row in rest]

    def _hidden(
        self, pieces: list[torch.Tensor], position: torch.Tensor, prefix: list[int]
    ) -> torch.Tensor:
        edge = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
        segments = Segments.of(edge, np.array(prefix), position.device)
        return packed_hidden(self._model, torch.cat(pieces), position, segments)


def _cause(error: Exception) -> str:
    """On one line; an advice to somebody else's caller is left out."""
    if isinstance(error, StillroomError):
        return f"{error.where} expected {error.expected}; got {error.got}"
    return first_line(error)


def _gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far hidden states are apart, as a part of their size; NaN where one is not finite."""
    return float((found - wanted).float().norm() / wanted.float().norm())
