"""The student: a causal language model that reads packed micro-batches and gives logits at scored
positions only.

Shapes: T tokens, P scored positions, H hidden, V logit width, R rows.
"""

import torch
from transformers import PreTrainedModel

from stillroom.cache.causal_lm import head_logits, load_causal_lm, trunk
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.replay.batch import MicroBatch
from stillroom.train.attention import NAME
from stillroom.train.target import TeacherTarget

PACKING_TOLERANCE = 0.05  # of the hidden states' norm: room for half precision, not for other maths


class Student(torch.nn.Module):
    """A model with its packed forward.

    Args:
        model: loaded with row attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap the model; its parameters stay its own."""
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """(P, V) logits of the scored positions of a micro-batch."""
        device = self.model.device
        row_start = torch.from_numpy(batch.row_start).to(device)
        longest = int((batch.row_start[1:] - batch.row_start[:-1]).max())
        hidden = trunk(
            self.model,
            torch.from_numpy(batch.token).to(device)[None],
            position_ids=torch.from_numpy(batch.position_id).to(device)[None],
            cu_seq_lens_q=row_start,
            cu_seq_lens_k=row_start,
            max_length_q=longest,
            max_length_k=longest,
        )
        picked = hidden[0, torch.from_numpy(batch.predict_index).to(device)]
        return head_logits(self.model, picked)


def load_student(files: ModelFiles, dtype: str, device: torch.device) -> Student:
    """Load a student for packed training or evaluation.

    Raises:
        InputError: the folder cannot be used, or its architecture cannot be packed.
    """
    model = load_causal_lm(files, dtype, device)
    probe = [torch.arange(3 + i, 9 + i, device=device) % files.vocab_size for i in range(2)]
    with torch.no_grad():
        alone = trunk(model, probe[1][None])[0]
    model.set_attn_implementation(NAME)
    student = Student(model)
    _check_packing(student, files, probe, alone)
    return student


def to_target(batch: MicroBatch, device: torch.device) -> TeacherTarget:
    """The teacher's side of a micro-batch, as tensors; every position is scored."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(getattr(batch, name)).to(device)

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


@torch.no_grad()
def _check_packing(
    student: Student, files: ModelFiles, probe: list[torch.Tensor], alone: torch.Tensor
) -> None:
    """The second of two packed rows must be what it is alone, whatever the first one is."""
    first, second = probe
    device = student.model.device
    starts = torch.tensor([0, 6, 12], dtype=torch.int32, device=device)
    position = torch.arange(6, device=device).repeat(2)[None]

    def second_row(before: torch.Tensor) -> torch.Tensor:
        hidden = trunk(
            student.model,
            torch.cat([before, second])[None],
            position_ids=position,
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=6,
            max_length_k=6,
        )
        return hidden[0, 6:]

    one, other = second_row(first), second_row(first.flip(0))
    if not bool(torch.isfinite(one).all() & torch.isfinite(alone).all()):
        return
    name = type(student.model).__name__
    if not torch.equal(one, other):
        raise InputError(
            str(files.folder),
            "an architecture whose packed rows cannot see one another",
            f"{name}, where they can (difference {(one - other).abs().max().item():.2g})",
            "Architectures with a running state are not supported by packing yet.",
        )
    difference = ((one - alone).float().norm() / alone.float().norm()).item()
    if difference > PACKING_TOLERANCE:
        raise InputError(
            str(files.folder),
            "an architecture whose packed rows are what they are alone",
            f"{name}, where they differ by {difference:.2g} of their size",
            "Attention with more than scores and a window (such as sinks) is not supported yet.",
        )
