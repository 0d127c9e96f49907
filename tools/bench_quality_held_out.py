"""Held-out measurements of the quality study: how far a student is from the teacher on fresh
rollouts of its own, and on text that the teacher wrote once."""

# Shapes: P scored positions, V vocabulary.

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
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher, TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay.prompts import Prompt, PromptsConfig, load_prompts
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.tools.bench_quality_cells import Study
from stillroom.train.durable import write_file
from stillroom.train.objectives import divergence, student_bucket_logprob
from stillroom.train.target import TeacherTarget, teacher_buckets

T = TypeVar("T")
SEED = 0
"""Of all held-out sampling, so that measurements differ by the student alone."""
BATCH_ROWS = 32


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
    """Measures students on the held-out prompts.

    Args:
        study: the settings.
        models: its models.
        teacher: loaded.
        path: what `write_held_out` wrote.
    """

    def __init__(self, study: Study, models: Models, teacher: Teacher, path: Path) -> None:
        """Load a student to sample with, and score the teacher's text."""
        rows = jsonfile.load(path.read_bytes(), str(path))["rows"]
        self._prompts = [np.array(row["prompt"], np.uint32) for row in rows]
        written = [np.array(row["completion"], np.uint32) for row in rows]
        self._teacher, self._spec = teacher, ScoreSpec(topk=study.topk)
        self._vocab_size = models.student.vocab_size
        self._student = TransformersSampler(models.student, sampler_config(study))
        self._written = self._scored(written)

    def measure(self, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """Measure a student with these weights, which are shared; None: the initial one.

        Returns:
            For `student` (its own fresh rollouts) and `teacher` (the teacher's text) means over
            positions: `forward_kl_nats` and `reverse_kl_nats` over {top K, sampled token, tail},
            `tail_mass` (the student's probability outside those tokens), and `positions`.
        """
        if state is not None:
            self._student.take_weights(state)
        fresh = self._scored(_sampled(self._student, self._prompts))
        return {"student": self._distance(*fresh), "teacher": self._distance(*self._written)}

    def _scored(self, completions: list[np.ndarray]) -> tuple[list[ScoreRow], list[RowScores]]:
        pairs = zip(self._prompts, completions, strict=True)
        rows = [
            ScoreRow(np.concatenate([p, c]), np.arange(len(p), len(p) + len(c))) for p, c in pairs
        ]
        return rows, _in_order(dict(self._teacher.score(rows, self._spec)))

    @torch.inference_mode()
    def _distance(self, rows: list[ScoreRow], scores: list[RowScores]) -> dict[str, float]:
        sums = np.zeros(3)
        for row, scored in zip(rows, scores, strict=True):
            logit_PV = self._logits(row)
            target = _target(row, scored)
            own = student_bucket_logprob(logit_PV, teacher_buckets(target, self._vocab_size))
            kl = [divergence(logit_PV, target, kind) for kind in ("forward", "reverse")]
            sums += [float(x.double().sum()) for x in (*kl, own[:, -1].exp())]
        positions = sum(len(row.targets) for row in rows)
        names = ("forward_kl_nats", "reverse_kl_nats", "tail_mass")
        means = dict(zip(names, (sums / positions).tolist(), strict=True))
        return {**means, "positions": positions}

    def _logits(self, row: ScoreRow) -> torch.Tensor:
        model = self._student.model
        token = torch.from_numpy(row.token.astype(np.int64))[None]
        hidden = trunk(model, token)[0][torch.from_numpy(row.targets - 1)]
        return head_logits(model, hidden)[:, : self._vocab_size].float()


def _target(row: ScoreRow, scores: RowScores) -> TeacherTarget:
    sampled = row.token[row.targets].astype(np.int64)
    # An unused entry's id is no token of any vocabulary; a target says so with a negative one.
    ids = np.where(np.isneginf(scores.topk_logprob), -1, scores.topk_id.astype(np.int64))
    return TeacherTarget(
        topk_id=torch.from_numpy(ids),
        topk_logprob=torch.from_numpy(scores.topk_logprob.astype(np.float32)),
        tail_logprob=torch.from_numpy(scores.tail_logprob.astype(np.float32)),
        sampled_id=torch.from_numpy(sampled),
        sampled_logprob=torch.from_numpy(scores.sampled_logprob),
        behaviour_logprob=None,
        mask=torch.ones(len(sampled), dtype=torch.bool),
    )


def _sampled(sampler: TransformersSampler, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [sampled.completion for sampled in _in_order(dict(sampler.sample(prompts, SEED)))]


def _in_order(found: dict[int, T]) -> list[T]:
    return [found[i] for i in range(len(found))]
