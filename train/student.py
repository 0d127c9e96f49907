"""The student: a causal language model that reads packed micro-batches and gives hidden states, or
logits, at scored positions only.

Shapes: T tokens, P scored positions, M extra ids, H hidden, V logit width, R segments.
"""

import torch
from transformers import AttentionInterface, PreTrainedModel

from stillroom.cache.causal_lm import head_logits, load_causal_lm, trunk
from stillroom.cache.errors import ShapeError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.replay.batch import MicroBatch
from stillroom.replay.pinned import on_device
from stillroom.train.attention import NAME, row_attention
from stillroom.train.config import ReplayConfig
from stillroom.train.packed_forward import packed_hidden, why_not_packed
from stillroom.train.parallel import decoder_layers
from stillroom.train.ranks import world
from stillroom.train.segments import Segments
from stillroom.train.target import TeacherTarget

SCORES = (
    "topk_id",
    "topk_logprob",
    "tail_logprob",
    "sampled_id",
    "sampled_logprob",
    "behaviour_logprob",
    "sampling_temperature",
)
EXTRAS = ("extra_id", "extra_logprob", "extra_behaviour_logprob")


class Student(torch.nn.Module):
    """A model with its packed forward.

    Args:
        model: loaded; one that packs has the attention of `train.attention`.
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

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """(P, H) last hidden states that predict the scored positions of a micro-batch.

        Raises:
            ShapeError: several rows, or a shared prompt, for a student that does not take them.
        """
        self._check(batch)
        device = self.model.device
        token = on_device(batch.token, device)
        if self.packs:
            segments = Segments.of(batch.row_start, batch.prefix, device)
            position = on_device(batch.position_id, device)
            hidden = packed_hidden(self.model, token, position, segments)
        else:
            hidden = trunk(self.model, token[None])[0]
        return hidden[on_device(batch.predict_index, device)]

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """(P, V) logits of the scored positions of a micro-batch, all at once.

        Raises:
            ShapeError: as `hidden`.
        """
        return head_logits(self.model, self.hidden(batch))

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
    student = Student(model, *why_not_packed(model, files.vocab_size))
    if student.packs:
        model.set_attn_implementation(NAME)
    return student


def load_trainable(files: ModelFiles, config: ReplayConfig, device: torch.device) -> Student:
    """Load a student to be trained: in float32, with adapters, recomputed activations and compiled
    layers where the settings say so. One that several processes will share out stays in main
    memory; `Parallel` takes it to the device.

    Raises:
        InputError: the folder cannot be used, or there are no layers to compile.
        ConfigError: there are no such layers for adapters.
    """
    is_shared_out = config.parallel == "fsdp" and world() > 1
    student = load_student(files, "float32", torch.device("cpu") if is_shared_out else device)
    model = student.model
    if config.lora is not None:
        from stillroom.train.lora import add_lora

        add_lora(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        compile_layers(model)
    return student.train()


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the model's decoder layers, for micro-batches of any length.

    Our attention stays as it is: compiled, it would be so for each number of rows anew.

    Raises:
        InputError: it has no list of decoder layers.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(row_attention))  # type: ignore[no-untyped-call]
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def to_target(batch: MicroBatch, device: torch.device, *, extras: bool = False) -> TeacherTarget:
    """The teacher's side of a micro-batch, as tensors; every position is scored.

    Small dtypes are widened on the device, which is exact.

    Args:
        batch: P positions.
        device: where to.
        extras: also take the extra ids, where there are any.
    """

    def tensor(name: str) -> torch.Tensor:
        moved = on_device(getattr(batch, name), device)
        return moved.long() if name.endswith("_id") else moved.float()

    names = [*SCORES, *(EXTRAS if extras and batch.extra_id.shape[1] else ())]
    mask = torch.ones(batch.num_positions, dtype=torch.bool, device=device)
    return TeacherTarget(**{name: tensor(name) for name in names}, mask=mask)
