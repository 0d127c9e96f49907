"""The programs whose steps are measured: the student alone, our trainer, TRL's, and the jobs that
fill a cache. Each takes its steps as its Turn comes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreRow, ScoreSpec, TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay import ReplayStream, Source, StreamConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.tools.bench_train_rows import Prepared
from stillroom.tools.bench_train_turns import ENDLESS, Turn
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.student import load_student
from stillroom.train.trainer import ReplayTrainer

IGNORED = -100
"""A label that cross-entropy leaves out."""


def bare_padded(turn: Turn, prepared: Prepared) -> None:
    """Forward and backward as a plain loop has them: logits of every token, and a mask."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(prepared.student, dtype=torch.float32)
    rows = zip(prepared.prompts, prepared.completions, strict=True)
    ids = torch.tensor([prompt + completion for prompt, completion in rows])
    labels = ids.clone()
    labels[:, : len(prepared.prompts[0])] = IGNORED
    model.train()
    while turn.next():
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()


def bare_packed(turn: Turn, prepared: Prepared) -> None:
    """Forward and backward of packed rows, with the logits of scored positions only."""
    cache = Cache.open(prepared.root)
    student = load_student(inspect_model(prepared.student), "float32", torch.device("cpu")).train()
    config = _stream_config(prepared)
    with ReplayStream(Source(cache, cache.snapshot()), config) as stream:
        (micro,) = stream.next_batch().micro_batches
    assert micro is not None
    label = torch.from_numpy(micro.sampled_id).long()
    while turn.next():
        student.zero_grad()
        functional.cross_entropy(student(micro), label).backward()  # type: ignore[no-untyped-call]


def replay(turn: Turn, prepared: Prepared, output: str, settings: dict[str, Any]) -> None:
    """Our trainer, from the stream to the optimiser's step."""
    stream = _stream_config(prepared)
    config = ReplayConfig(**settings, max_steps=ENDLESS, device="cpu", replay=stream)
    callbacks, folder = (_InTurn(turn),), Path(output)
    run = folder.name.replace(",", "")
    ReplayTrainer(
        prepared.student, prepared.root, config, output=folder, run=run, callbacks=callbacks
    ).train()


class _InTurn(Callback):
    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_begin(self, trainer: ReplayTrainer) -> None:
        self._wait(trainer)

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        self._turn.note("wait_s", outcome.wait_s)
        self._wait(trainer)

    def _wait(self, trainer: ReplayTrainer) -> None:
        if not self._turn.next():
            trainer.stop("measured")


def roll_out(turn: Turn, prepared: Prepared) -> None:
    """Sample a completion of each prompt."""
    longest = len(prepared.completions[0])
    rows = len(prepared.prompts)
    config = SamplerConfig(max_new_tokens=longest, batch_rows=rows, device="cpu")
    sampler = TransformersSampler(inspect_model(prepared.student), config)
    prompts = [np.asarray(prompt, np.uint32) for prompt in prepared.prompts]
    seed = 0
    while turn.next():
        turn.note("tokens", sum(len(done.completion) for _, done in sampler.sample(prompts, seed)))
        seed += 1


def score(turn: Turn, prepared: Prepared) -> None:
    """Let the teacher score every row."""
    teacher = TransformersTeacher(
        inspect_model(prepared.teacher), TeacherConfig(model=prepared.teacher, device="cpu")
    )
    spec = ScoreSpec.of(Cache.open(prepared.root).identity)
    rows = [
        ScoreRow(
            np.asarray(prompt + completion, np.uint32),
            np.arange(len(prompt), len(prompt) + len(completion)),
        )
        for prompt, completion in zip(prepared.prompts, prepared.completions, strict=True)
    ]
    while turn.next():
        for _ in teacher.score(rows, spec):
            pass


def _stream_config(prepared: Prepared) -> StreamConfig:
    """All rows in every step, in one micro-batch; one batch ahead, so that a step makes the next
    one's."""
    rows = len(prepared.prompts)
    longest = len(prepared.prompts[0]) + len(prepared.completions[0])
    return StreamConfig(batch_rows=rows, max_tokens=rows * longest, ahead_bytes=1)
