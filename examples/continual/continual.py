"""Fine-tune a model on documents that are new to it, see it drift from what it was, and win that
back with the original as teacher, from answers that were scored once.

    python examples/continual/continual.py [--output runs/continual]

It needs the models of `examples/quickstart/prepare.py`, and takes its documents from Python itself:
the language reference that `help()` shows. A run in two phases, fine-tuning and then replay, is
measured before, between and after; a control only goes on with fine-tuning. What is made stays in
the output folder and is not made again; to start anew, name another one.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoTokenizer

from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.tools.cli import main as stillroom
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.evaluate import evaluate
from stillroom.train.phases import Phase
from stillroom.train.supervised import SupervisedStream
from stillroom.train.supervised_data import SupervisedConfig, load_supervised
from stillroom.train.trainer import ReplayTrainer

ORIGINAL = Path.home() / ".cache" / "stillroom" / "quickstart" / "teacher"
PROMPTS = Path(__file__).with_name("prompts.jsonl")
HELD_OUT_EVERY = 4
"""Of documents and prompts, this one of so many is only measured on."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the experiment."""

    original: Path = ORIGINAL
    """The model, which is student and teacher."""
    prompts: Path = PROMPTS
    """Prompts whose answers the student is to keep."""
    documents: int = 79
    """How many documents."""
    row_tokens: int = 96
    """Tokens of a piece of a document."""
    measured_rows: int = 16
    """Held-out pieces to measure on."""
    answer_tokens: int = 40
    samples: int = 1
    """Answers to each prompt."""
    learning_steps: int = 24
    replay_steps: int = 36
    learning_rate: float = 2e-4
    replay_learning_rate: float = 1e-4
    batch_rows: int = 4
    """Pieces of a step of fine-tuning; replay takes twice as many answers."""


@dataclass
class Measure(Callback):
    """Measures the student before the first step and after some others."""

    held_out: Cache
    text: SupervisedConfig
    rows: int
    names: Mapping[int, str]
    """What to call the student after so many steps."""
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    def on_begin(self, trainer: ReplayTrainer) -> None:
        """Before the first step."""
        self._measure(trainer, 0)

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """After a step."""
        self._measure(trainer, outcome.step)

    def _measure(self, trainer: ReplayTrainer, step: int) -> None:
        if step not in self.names:
            return
        answers = evaluate(
            trainer.student, self.held_out, self.held_out.snapshot(), trainer.config.replay
        ).sources["student"]
        found = {
            "text_loss_nats": self._text_loss(trainer),
            "forward_kl_nats": answers.forward_kl_nats,
            "reverse_kl_nats": answers.reverse_kl_nats,
        }
        self.found[self.names[step]] = found
        print(f"{self.names[step]}: {json.dumps(found)}", flush=True)

    @torch.no_grad()
    def _text_loss(self, trainer: ReplayTrainer) -> float:
        """Mean over the tokens of held-out pieces, always the same ones."""
        rows = load_supervised(self.text, AutoTokenizer.from_pretrained(trainer.files.folder))
        stream = SupervisedStream(rows, self.text, one_row=not trainer.student.packs)
        total, positions = 0.0, 0
        trainer.student.eval()
        while positions < self.rows * (self.text.max_length - 1):
            batch = stream.next_batch()
            for micro in batch.micro_batches:
                assert micro is not None, "only where several ranks share a step"
                logits = trainer.student(micro).float()
                wanted = torch.from_numpy(micro.sampled_id).to(logits.device)
                total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            positions += batch.num_positions
        trainer.student.train()
        return total / positions


def split(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Write rows to two files, one to use and one that is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.jsonl", folder / f"{name}-held-out.jsonl"
    for held_out, path in enumerate(paths):
        own = [row for i, row in enumerate(rows) if (i % HELD_OUT_EVERY == 0) == bool(held_out)]
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
    return paths


def cached_answers(root: Path, prompts: Path, settings: Settings) -> Cache:
    """The original's answers to prompts, with its own scores; made once."""
    sampler = f"--sampler.max-new-tokens {settings.answer_tokens} "
    sampler += f"--sampler.samples-per-prompt {settings.samples}"
    model, at = str(settings.original), f"--root {root}"
    for job, flags in (
        ("init", ["--teacher.model", model, "--student", model]),
        ("rollout", ["--prompts.source", str(prompts), *sampler.split()]),
        ("score", ["--teacher.model", model]),
    ):
        if stillroom([job, *at.split(), *flags]):
            raise SystemExit(f"stillroom {job} failed")
    return Cache.open(root)


def run(output: Path, settings: Settings) -> dict[str, dict[str, float]]:
    """Both runs; returns what was measured of each student."""
    documents = [{"text": topics[name]} for name in sorted(topics)][: settings.documents]
    learned, unseen = split(output, "text", documents)
    asked = [json.loads(line) for line in settings.prompts.read_text().splitlines()]
    prompts, held_out = split(output, "prompts", asked)
    cache = cached_answers(output / "cache", prompts, settings)
    measured = cached_answers(output / "held-out", held_out, settings)

    tokens = settings.batch_rows * settings.row_tokens
    text = SupervisedConfig(
        source=str(learned),
        max_length=settings.row_tokens,
        batch_rows=settings.batch_rows,
        max_tokens=tokens,
    )
    learn, back = settings.learning_steps, settings.replay_steps
    runs = {
        "replay": (
            Phase(supervised=text, max_steps=learn),
            Phase(max_steps=back, learning_rate=settings.replay_learning_rate),
        ),
        "control": (Phase(supervised=text, max_steps=learn + back),),
    }
    names = {
        "replay": {0: "original", learn: "fine-tuned", learn + back: "replayed"},
        "control": {learn + back: "fine-tuned on"},
    }
    found: dict[str, dict[str, float]] = {}
    for name, phases in runs.items():
        config = ReplayConfig(
            phases=phases,
            learning_rate=settings.learning_rate,
            replay=StreamConfig(batch_rows=2 * settings.batch_rows, max_tokens=2 * tokens),
        )
        other = replace(text, source=str(unseen))
        measure = Measure(measured, other, settings.measured_rows, names[name])
        ReplayTrainer(
            settings.original, cache, config, output=output, run=name, callbacks=[measure]
        ).train()
        found |= measure.found
    (output / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/continual"))
    parser.add_argument("--original", type=Path, default=ORIGINAL, help="folder of the model")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--replay-learning-rate", type=float, default=Settings.replay_learning_rate)
    parser.add_argument("--learning-steps", type=int, default=Settings.learning_steps)
    parser.add_argument("--replay-steps", type=int, default=Settings.replay_steps)
    given = vars(parser.parse_args())
    found = run(given.pop("output"), Settings(**given))
    print("\n| student | loss on new text | forward KL | reverse KL |\n|---|---|---|---|")
    for name, values in found.items():
        print("| " + " | ".join([name, *(f"{value:.3f}" for value in values.values())]) + " |")


if __name__ == "__main__":
    main()
