"""The quality study's settings, and its cells: a method, an objective and a seed each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.cache.errors import ConfigError

OBJECTIVES = ("forward", "reverse", "jsd")
"""Forward KL; reverse KL (of replay: reverse_kl_rb); JSD of equal weights."""
COLLAPSE = ("reverse_tail", "reverse_truncated")
"""Reverse KL over buckets, with the tail's and without."""
TRL, REPLAY, GROUPED, SHUFFLED = "trl", "replay", "grouped", "shuffled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that decides a cell's figures but its method, objective and seed."""

    models: str = "~/.cache/stillroom/quickstart"
    """Folder with teacher, student, prompts.jsonl and held_out.jsonl."""
    updates: int = 32
    """Optimiser steps of every cell."""
    eval_every: int = 8
    """Updates between measurements."""
    intervals: tuple[int, ...] = (4, 16, 64)
    """Updates between refreshes of replay."""
    control_interval: int = 16
    """Updates between refreshes of grouped cells and of the controls: shuffled scores, and the
    truncated loss."""
    refresh_rows: int = 32
    """Rows that a refresh samples; no more than are replayed until the next one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the prompts' order, of sampling and of the replay order."""
    batch_rows: int = 4
    """Rows of an update."""
    max_new_tokens: int = 40
    """Longest completion, in training and in measurements."""
    max_prompt_tokens: int = 176
    """Longer prompts are left out."""
    held_out_prompts: int = 8
    """Prompts that are measured on."""
    learning_rate: float = 2e-4
    """Of AdamW without weight decay, constant."""
    topk: int = 64
    """K of replay, and of the tokens outside of which a student's tail mass is measured."""
    threads: int = 1
    """CPU threads of a cell."""

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"study.{name}", "at least 1", f"{value}", "Raise it.")
        for name in ("intervals", "seeds"):
            value = getattr(self, name)
            if not value or min(value) < (name == "intervals"):
                raise ConfigError(
                    f"study.{name}", "one at least, none lower", f"{value}", "Set it."
                )
        if self.updates % self.eval_every:
            expected = f"a divisor of {self.updates} updates"
            raise ConfigError("study.eval_every", expected, f"{self.eval_every}", "Change it.")
        if self.refresh_rows < self.batch_rows:
            expected = f"at least the {self.batch_rows} of an update"
            raise ConfigError("study.refresh_rows", expected, f"{self.refresh_rows}", "Raise it.")
        if not 0 < self.learning_rate < 1:
            got = f"{self.learning_rate}"
            raise ConfigError("study.learning_rate", "above 0 and below 1", got, "Change it.")

    def rows_of(self, interval: int) -> int:
        """Rows that a refresh samples where one comes after so many updates."""
        return min(self.refresh_rows, interval * self.batch_rows)

    def reuse_of(self, interval: int) -> float:
        """How often each sampled row is replayed, on the average."""
        refreshes = -(-self.updates // interval)
        return self.updates * self.batch_rows / (refreshes * self.rows_of(interval))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run of the study."""

    method: str
    """trl; replay; grouped (replay of all rollouts of one prompt in an update, which go through the
    student with their prompt once); or shuffled (replay with the teacher's scores of other
    positions)."""
    interval: int
    """Updates between refreshes; 0 for TRL, which samples anew for each update."""
    objective: str
    seed: int

    @property
    def way(self) -> str:
        """The method with its interval."""
        return f"{self.method}-{self.interval}" if self.interval else self.method

    @property
    def name(self) -> str:
        """As files and `--only` name it."""
        return f"{self.way}.{self.objective}.{self.seed}"


def cells_of(study: Study) -> Iterator[Cell]:
    """All cells; seed by seed, so that those of the first seed are a small study of their own."""
    for seed in study.seeds:
        for objective in OBJECTIVES:
            yield Cell(TRL, 0, objective, seed)
            for interval in study.intervals:
                yield Cell(REPLAY, interval, objective, seed)
        yield Cell(GROUPED, study.control_interval, "forward", seed)
        yield Cell(SHUFFLED, study.control_interval, "forward", seed)
        for objective in COLLAPSE:
            yield Cell(REPLAY, study.control_interval, objective, seed)
