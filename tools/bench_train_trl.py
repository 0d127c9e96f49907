"""TRL's DistillationTrainer as one of the programs whose steps are measured."""

import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from stillroom.tools.bench_train_rows import Prepared
from stillroom.tools.bench_train_turns import ENDLESS, Turn


def trl(turn: Turn, prepared: Prepared, output: str, settings: dict[str, Any]) -> None:
    """TRL's trainer with a live teacher: it samples, lets the teacher read, and takes a step."""
    student: Any = AutoModelForCausalLM.from_pretrained(prepared.student, dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(prepared.teacher, dtype=torch.float32)
    rows, longest = len(prepared.prompts), len(prepared.completions[0])
    config = DistillationConfig(
        output_dir=output,
        per_device_train_batch_size=rows,
        max_completion_length=longest,
        generation_kwargs={"min_new_tokens": longest},
        beta=0.0,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_steps=ENDLESS,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        logging_steps=ENDLESS,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = _SameRows(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(rows)]}),
        processing_class=AutoTokenizer.from_pretrained(prepared.student, padding_side="left"),
        callbacks=[_InTurn(turn)],
    )
    trainer.rows, trainer.turn = prepared, turn
    trainer.train()


class _SameRows(DistillationTrainer):  # type: ignore[misc]
    """Trains on the rows that the others train on: it samples as it always does, and is then given
    the rows' own completions, which are as long."""

    rows: Prepared
    turn: Turn

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self._numbers = [int(prompt) for prompt in prompts]
        return [self.rows.prompts[i] for i in self._numbers], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        start = time.perf_counter()
        super()._generate_single_turn(*args, **kwargs)
        self.turn.note("generate_s", time.perf_counter() - start)
        return [self.rows.completions[i] for i in self._numbers]


class _InTurn(TrainerCallback):
    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self._turn.next()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self._turn.next()
