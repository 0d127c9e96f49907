"""`stillroom bench train`: what a distillation loss, a whole training step, and more processes
cost; a table each."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillroom.cache.progress import Progress
from stillroom.tools.bench_only import chosen
from stillroom.tools.bench_train_loss import (
    WAYS,
    LossFigures,
    Settings,
    Shape,
    bench_losses,
)
from stillroom.tools.bench_train_rows import Sizes
from stillroom.tools.bench_train_step import StepTable, bench_ranks, bench_steps
from stillroom.tools.render import print_table, say

LOSS_COLUMNS = ("loss", "T", "V", "H", "nats", "peak MiB", "s", "x chunked CE", "rounds", "")
STEP_COLUMNS = ("program", "s/step", "least", "most", "tokens/s", "generate s", "wait s")
PROGRAMS = {"step": 5, "ranks": 4}
"""Without TRL's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainFigures:
    """All of one run; a part that was not asked for is None."""

    loss: list[LossFigures] | None
    step: StepTable | None
    ranks: StepTable | None


def bench_train(
    parts: Sequence[str],
    *,
    shapes: Sequence[Shape],
    losses: Settings,
    models: Path,
    sizes: Sizes,
    steps: int,
    threads: int,
    with_peers: bool,
    only: Sequence[str] = (),
) -> TrainFigures:
    """Measure training.

    Args:
        parts: of loss, step and ranks.
        shapes: sizes of the losses.
        losses: how those are measured.
        models: the folder that the quickstart's `prepare.py` made, for step and ranks.
        sizes: of a step's rows.
        steps: that are measured of each program.
        threads: of each.
        with_peers: measure TRL's trainer, and the losses of TRL and Liger, where installed.
        only: patterns of the losses that are measured; all without any.

    Raises:
        ConfigError: a pattern matches no loss.
        MissingError: models or prompts are not there.
    """
    ways = [way for way in WAYS if way.installed and (with_peers or not way.package)]
    ways = chosen(ways, only)
    with_trl = with_peers and find_spec("trl") is not None
    counts = {name: count * steps for name, count in PROGRAMS.items()}
    counts["step"] += with_trl * steps
    counts["loss"] = len(ways) * len(shapes)
    with Progress("bench", sum(counts[part] for part in parts), "figures") as progress:
        done: Callable[[], None] = progress.advance
        of_steps = models, sizes, steps, threads, done
        return TrainFigures(
            loss=bench_losses(shapes, ways, losses, done) if "loss" in parts else None,
            step=bench_steps(*of_steps, with_trl=with_trl) if "step" in parts else None,
            ranks=bench_ranks(*of_steps) if "ranks" in parts else None,
        )


def as_json(figures: TrainFigures) -> dict[str, Any]:
    """Plain values."""
    return {name: value for name, value in asdict(figures).items() if value is not None}


def print_figures(figures: TrainFigures) -> None:
    """Print tables."""
    if figures.loss is not None:
        print_table(LOSS_COLUMNS, map(_loss_row, figures.loss), text=("loss", ""))
    for table in (figures.step, figures.ranks):
        if table is not None:
            _print_steps(table)


def _loss_row(row: LossFigures) -> tuple[object, ...]:
    sizes = row.tokens, row.vocab, row.width
    measured = round(row.peak_mb), round(row.seconds, 3), round(row.ratio, 3), row.rounds
    return row.name, *sizes, row.loss, *measured, "computed" if row.computed else ""


def _print_steps(table: StepTable) -> None:
    rows = [
        (
            row.name,
            round(row.seconds, 3),
            round(row.least_s, 3),
            round(row.most_s, 3),
            round(row.tokens_s),
            row.generate_s,
            row.wait_s,
        )
        for row in table.programs
    ]
    print_table(STEP_COLUMNS, rows, text=("program",))
    for name, ratio in table.ratios.items():
        say(f"{name}: {ratio:.2f}")
    for cost in table.amortised:
        beside = "" if cost.trl_ratio is None else f", TRL's by it {cost.trl_ratio:.2f}"
        times = "once" if cost.replays == 1 else f"{cost.replays} times"
        say(f"Rows sampled, scored and replayed {times}: {cost.seconds:.2f} s a step{beside}")
