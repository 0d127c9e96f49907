"""Held-out measurements of the quality study: how far a student is from the teacher on fresh
rollouts of its own, and on text that the teacher wrote once."""

# Shapes: P positions of a completion, V vocabulary.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoTokenizer

from stillroom.cache import jsonfile
from stillroom.cache.causal_lm import head_logits, trunk
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import local_path
from stillroom.cache.teacher import TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay.prompts import Prompt, PromptsConfig, load_prompts
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.tools.bench_quality_cells import Study
from stillroom.train.durable import write_file

T = TypeVar("T")
SEED = 0
"""Of all held-out sampling, so that measurements differ by the student alone."""
BATCH_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Answer:
    """A held-out prompt with a completion."""

    token: torch.Tensor
    """(n,) int64, both."""
    start: int
    """Where the completion begins."""
    teacher: torch.Tensor
    """(P, V) float32, nats: the teacher's logprobs at its positions."""


@dataclass(frozen=True, slots=True)
class Models:
    """Teacher, student and prompts of a study."""

    folder: Path
    teacher: ModelFiles
    student: ModelFiles

    @classmethod
    def of(cls, study: Study) -> "Models":
        """Inspect them.

        Raises:
            StillroomError: a model cannot be used.
        """
        folder = local_path(study.models)
        teacher, student = (inspect_model(str(folder / name)) for name in ("teacher", "student"))
        return cls(folder, teacher, student)

    def load_teacher(self) -> TransformersTeacher:
        """The teacher in memory, in float32."""
        return TransformersTeacher(self.teacher, self.teacher_config)

    @property
    def teacher_config(self) -> TeacherConfig:
        """How it runs."""
        return TeacherConfig(model=str(self.teacher.folder), device="cpu", max_batch_tokens=2048)

    def prompts(self, study: Study, name: str) -> tuple[Prompt, ...]:
        """Prompts of a file of the folder, in its order."""
        room = self.student.max_length - study.max_new_tokens
        config = PromptsConfig(
            source=str(self.folder / name), max_tokens=min(study.max_prompt_tokens, room)
        )
        tokenizer = AutoTokenizer.from_pretrained(self.student.folder)
        return load_prompts(config, tokenizer, room).prompts

    def training_prompts(self, study: Study, seed: int) -> list[Prompt]:
        """Those of training, in a seed's order."""
        prompts = self.prompts(study, "prompts.jsonl")
        order = np.random.default_rng(seed).permutation(len(prompts))
        return [prompts[i] for i in order]


def sampler_config(study: Study) -> SamplerConfig:
    """How everyone samples: temperature 1, nothing filtered."""
    return SamplerConfig(max_new_tokens=study.max_new_tokens, batch_rows=BATCH_ROWS, device="cpu")


def write_held_out(study: Study, path: Path) -> None:
    """Let the teacher answer the held-out prompts."""
    models = Models.of(study)
    prompts = models.prompts(study, "held_out.jsonl")[: study.held_out_prompts]
    sampler = TransformersSampler(models.teacher, sampler_config(study))
    completions = _sampled(sampler, [prompt.token for prompt in prompts])
    rows = [
        {"prompt": prompt.token.tolist(), "completion": completion.tolist()}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    write_file(path, jsonfile.dump({"rows": rows}))


class HeldOut:
    """Measures students on the held-out prompts, over the whole vocabulary.

    Args:
        study: the settings.
        models: its models.
        path: what `write_held_out` wrote.
    """

    def __init__(self, study: Study, models: Models, path: Path) -> None:
        """Load both models, and take the teacher's logprobs on its own text."""
        rows = jsonfile.load(path.read_bytes(), str(path))["rows"]
        self._prompts = [np.array(row["prompt"], np.uint32) for row in rows]
        self._topk, self._vocab_size = study.topk, models.student.vocab_size
        self._teacher, self._student = (
            TransformersSampler(files, sampler_config(study))
            for files in (models.teacher, models.student)
        )
        self._written = self._answers([np.array(row["completion"], np.uint32) for row in rows])

    def measure(self, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Measure a student with these weights, which are shared; None: the initial one.

        Returns:
            For `student` (its own fresh rollouts) and `teacher` (the teacher's text) means over
            positions: `forward_kl_nats` and `reverse_kl_nats` over the whole vocabulary,
            `tail_mass` (the student's probability outside the teacher's top K and the sampled
            token), and `positions`.
        """
        if state is not None:
            self._student.take_weights(state)
        fresh = self._answers(_sampled(self._student, self._prompts))
        return {"student": self._distance(fresh), "teacher": self._distance(self._written)}

    @torch.inference_mode()
    def _answers(self, completions: list[np.ndarray]) -> list[_Answer]:
        pairs = zip(self._prompts, completions, strict=True)
        made = ((np.concatenate([p, c]).astype(np.int64), len(p)) for p, c in pairs)
        return [
            _Answer(torch.from_numpy(token), start, self._logprobs(self._teacher, token, start))
            for token, start in made
        ]

    @torch.inference_mode()
    def _distance(self, answers: list[_Answer]) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64)
        for answer in answers:
            teacher = answer.teacher.double()
            student = self._logprobs(self._student, answer.token, answer.start).double()
            rest, sampled = student.exp(), answer.token[answer.start :, None]
            reverse = (rest * (student - teacher)).sum()
            forward = (teacher.exp() * (teacher - student)).sum()
            rest.scatter_(1, teacher.topk(self._topk).indices, 0.0).scatter_(1, sampled, 0.0)
            sums += torch.stack([forward, reverse, rest.sum()])
        positions = sum(len(answer.teacher) for answer in answers)
        names = ("forward_kl_nats", "reverse_kl_nats", "tail_mass")
        means = dict(zip(names, (sums / positions).tolist(), strict=True))
        return {**means, "positions": positions}

    def _logprobs(
        self, of: TransformersSampler, token: np.ndarray | torch.Tensor, start: int
    ) -> torch.Tensor:
        """(P, V) float32, nats, of a text's tokens from `start` on."""
        hidden = trunk(of.model, torch.as_tensor(token)[None])[0][start - 1 : -1]
        return head_logits(of.model, hidden)[:, : self._vocab_size].float().log_softmax(1)


def _sampled(sampler: TransformersSampler, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [sampled.completion for sampled in _in_order(dict(sampler.sample(prompts, SEED)))]


def _in_order(found: dict[int, T]) -> list[T]:
    return [found[i] for i in range(len(found))]
