"""A cell of the quality study that TRL's DistillationTrainer trains: on-policy, with the teacher in
every step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from stillroom.replay.prompts import Prompt
from stillroom.tools.bench_quality_cells import Cell, Study
from stillroom.tools.bench_quality_clock import Clock
from stillroom.tools.bench_quality_held_out import Models
from stillroom.tools.bench_quality_replay import Measure

BETA = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}
"""What TRL calls the objectives."""


def trl_cell(
    study: Study, cell: Cell, models: Models, folder: Path, clock: Clock, measure: Measure
) -> None:
    """Train the cell's student.

    Args:
        study: the settings.
        cell: of TRL.
        models: the study's.
        folder: for the trainer's output.
        clock: goes while the student is sampled and trained.
        measure: called after every `study.eval_every` updates, with the clock stopped.
    """
    student, teacher = (_loaded(files.folder) for files in (models.student, models.teacher))
    prompts = models.training_prompts(study, cell.seed)
    callback = _Timed(study, clock, measure)
    trainer = _SamePrompts(
        model=student,
        teacher_model=teacher,
        args=_config(study, cell, folder),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(prompts))]}),
        processing_class=AutoTokenizer.from_pretrained(models.student.folder, padding_side="left"),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.given, callback.trainer = prompts, trainer
    trainer.train()


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _config(study: Study, cell: Cell, folder: Path) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(folder),
        beta=BETA[cell.objective],
        per_device_train_batch_size=study.batch_rows,
        max_completion_length=study.max_new_tokens,
        max_steps=study.updates,
        learning_rate=study.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        seed=cell.seed,
        dataloader_pin_memory=False,
        report_to=[],
        logging_steps=study.updates,
        save_strategy="no",
        disable_tqdm=True,
    )


class _SamePrompts(DistillationTrainer):  # type: ignore[misc]
    """Takes prompts as the token ids that the replay cells have, and counts what is scored."""

    given: Sequence[Prompt]
    positions = 0
    """Tokens that the teacher scored so far."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.given[int(prompt)].token.tolist() for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        completions: list[list[int]] = super()._generate_single_turn(*args, **kwargs)
        self.positions += sum(map(len, completions))
        return completions


class _Timed(TrainerCallback):
    trainer: _SamePrompts

    def __init__(self, study: Study, clock: Clock, measure: Measure) -> None:
        self._study, self._clock, self._measure = study, clock, measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._study.eval_every == 0:
            with self._clock.paused():
                weights = self.trainer.model.state_dict()
                self._measure(state.global_step, self.trainer.positions, weights)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock.stop()
