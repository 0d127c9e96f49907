"""The student: a causal language model that reads packed micro-batches and gives logits at scored
positions only.

Shapes: T tokens, P scored positions, H hidden, V logit width, R segments.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from stillroom.cache.causal_lm import head_logits, load_causal_lm, trunk
from stillroom.cache.errors import ShapeError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.replay.batch import MicroBatch
from stillroom.train.attention import NAME
from stillroom.train.segments import Segments
from stillroom.train.target import TeacherTarget

PACKING_TOLERANCE = 0.05  # of the hidden states' norm: room for half precision, not for other maths
LEAK_TOLERANCE = 0.01  # the same, for what other rows may change: nothing, but in mixtures of
LEAK_ROUNDINGS = (
    100  # experts, whose matrix products have other shapes; in float32 so many epsilons
)
PROBE_PROMPT, PROBE_TOKENS = 3, 6


class Student(torch.nn.Module):
    """A model with its packed forward.

    Args:
        model: loaded; its attention is set here.
        why_one_row: why a micro-batch must be one row; empty if several may be packed.
        why_unshared: why packed rows cannot share a prompt; empty if they can.
    """

    def __init__(
        self, model: PreTrainedModel, why_one_row: str = "", why_unshared: str = ""
    ) -> None:
        """Wrap the model; its parameters stay its own."""
        super().__init__()
        self.model = model
        self.why_one_row = why_one_row
        self.why_unshared = why_one_row or why_unshared

    @property
    def packs(self) -> bool:
        """Whether it takes micro-batches of several rows."""
        return not self.why_one_row

    @property
    def shares(self) -> bool:
        """Whether it takes rows that share a prompt."""
        return not self.why_unshared

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """(P, V) logits of the scored positions of a micro-batch.

        Raises:
            ShapeError: several rows, or a shared prompt, for a student that does not take them.
        """
        self._check(batch)
        device = self.model.device
        token = torch.from_numpy(batch.token).to(device)
        if self.packs:
            segments = Segments.of(batch.row_start, batch.prefix, device)
            position = torch.from_numpy(batch.position_id).to(device)
            hidden = _packed(self.model, token, position, segments)
        else:
            hidden = trunk(self.model, token[None])[0]
        return head_logits(self.model, hidden[torch.from_numpy(batch.predict_index).to(device)])

    def _check(self, batch: MicroBatch) -> None:
        if not self.packs and len(batch.prefix) > 1:
            got, do = f"{len(batch.prefix)} segments", f"Open a one_row stream: {self.why_one_row}."
            raise ShapeError("micro-batch", "one row", got, do)
        if not self.shares and (batch.prefix >= 0).any():
            do = f"Open a stream that shares no prompts: {self.why_unshared}."
            raise ShapeError("micro-batch", "whole rows", "a shared prompt", do)


def load_student(files: ModelFiles, dtype: str, device: torch.device) -> Student:
    """Load a student for training or evaluation.

    One whose packed rows are not what they are alone keeps its own attention and takes one row at a
    time; it says why.

    Raises:
        InputError: the folder cannot be used.
    """
    model = load_causal_lm(files, dtype, device)
    own = model.config._attn_implementation
    rows = [torch.arange(i, i + PROBE_TOKENS, device=device) % files.vocab_size for i in (3, 4)]
    rows[1][:PROBE_PROMPT] = rows[0][:PROBE_PROMPT]
    with torch.no_grad():
        alone = [trunk(model, row[None])[0] for row in rows]
        model.set_attn_implementation(NAME)
        student = Student(model, _why_one_row(model, rows, alone), _why_unlike(model, rows, alone))
    if not student.packs:
        model.set_attn_implementation(own)
    return student


def _packed(
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


def to_target(batch: MicroBatch, device: torch.device) -> TeacherTarget:
    """The teacher's side of a micro-batch, as tensors; every position is scored.

    Small dtypes are widened on the device, which is exact.
    """

    def tensor(name: str) -> torch.Tensor:
        moved = torch.from_numpy(getattr(batch, name)).to(device)
        return moved.float() if name.endswith("logprob") else moved.long()

    names = (
        "topk_id",
        "topk_logprob",
        "tail_logprob",
        "sampled_id",
        "sampled_logprob",
        "behaviour_logprob",
    )
    mask = torch.ones(batch.num_positions, dtype=torch.bool, device=device)
    return TeacherTarget(**{name: tensor(name) for name in names}, mask=mask)


def _why_one_row(
    model: PreTrainedModel, rows: list[torch.Tensor], alone: list[torch.Tensor]
) -> str:
    """What keeps rows from being packed; empty if nothing does.

    Args:
        model: with row attention.
        rows: two of PROBE_TOKENS tokens, of which the first PROBE_PROMPT are the same.
        alone: their last hidden states.
    """
    one, other = (_probe(model, [x, rows[1]])[1] for x in (rows[0], rows[0].flip(0)))
    if not bool(torch.isfinite(one).all() & torch.isfinite(alone[1]).all()):
        return ""
    if _gap(one, other) > min(LEAK_TOLERANCE, LEAK_ROUNDINGS * torch.finfo(one.dtype).eps):
        return f"packed rows of {type(model).__name__} see one another"
    return _why_unlike(model, rows, alone, shared=False)


def _why_unlike(
    model: PreTrainedModel,
    rows: list[torch.Tensor],
    alone: list[torch.Tensor],
    *,
    shared: bool = True,
) -> str:
    """How rows that share their prompt (or packed ones) are not what they are alone, if so."""
    for found, single in zip(_probe(model, rows, shared=shared), alone, strict=True):
        gap = _gap(found, single)
        if gap > PACKING_TOLERANCE:
            kind = "rows with a shared prompt" if shared else "packed rows"
            return f"{kind} of {type(model).__name__} differ by {gap:.2g} from what they are alone"
    return ""


def _gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far hidden states are apart, as a part of their size."""
    return float((found - wanted).float().norm() / wanted.float().norm())


def _probe(
    model: PreTrainedModel, rows: list[torch.Tensor], *, shared: bool = False
) -> list[torch.Tensor]:
    """Last hidden states (PROBE_TOKENS, H) of both rows, packed or with a shared prompt."""
    device, cut, size = rows[0].device, PROBE_PROMPT, PROBE_TOKENS
    at = torch.arange(size, device=device)
    pieces = [rows[0][:cut], rows[0][cut:], rows[1][cut:]] if shared else rows
    position = torch.cat([at[:cut], at[cut:], at[cut:]] if shared else [at, at])
    edge = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
    prefix = np.array([-1, 0, 0] if shared else [-1, -1])
    hidden = _packed(model, torch.cat(pieces), position, Segments.of(edge, prefix, device))
    if not shared:
        return [hidden[:size], hidden[size:]]
    return [hidden[:size], torch.cat([hidden[:cut], hidden[size:]])]
