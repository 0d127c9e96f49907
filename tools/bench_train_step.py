"""`stillroom bench train --part step` and `--part ranks`: what a whole training step costs, beside
the student alone and TRL's trainer with a live teacher; in two processes, and in bfloat16."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from stillroom.tools.bench_stream import alone
from stillroom.tools.bench_train_rows import Prepared, Sizes, prepare
from stillroom.tools.bench_train_turns import Notes, Program, take_turns

PROGRAMS = "stillroom.tools.bench_train_programs"
TRL_PROGRAM = "stillroom.tools.bench_train_trl"
REPLAYS = (1, 2, 4, 8)
PADDED, PACKED = "student alone, padded", "student alone, packed"
OURS, TRL = "Stillroom", "TRL, live teacher"
ROLLOUT, SCORE = "rollout", "score"
LEARNING = {"learning_rate": 1e-5, "max_grad_norm": 1.0, "weight_decay": 0.0}
"""Settings that both trainers have under these names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """One program."""

    name: str
    seconds: float
    """Of a step, the median."""
    least_s: float
    most_s: float
    tokens_s: float
    """Tokens of the rows, prompts too, by those seconds."""
    steps: int
    generate_s: float | None = None
    """TRL: of them in which the student samples."""
    wait_s: float | None = None
    """Stillroom: of them in which the trainer waits for the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amortised:
    """What a step costs when every row is sampled and scored once and replayed so often."""

    replays: int
    seconds: float
    trl_ratio: float | None
    """TRL's step by that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTable:
    """The programs of one run."""

    programs: list[StepFigures]
    ratios: dict[str, float]
    """The first program's seconds by the second's, such as `a / b`: the median over rounds."""
    amortised: list[Amortised]


def bench_steps(
    models: Path,
    sizes: Sizes,
    steps: int,
    threads: int,
    done: Callable[[], None],
    *,
    with_trl: bool,
) -> StepTable:
    """Measure whole steps.

    Args:
        models: the folder that the quickstart's `prepare.py` made.
        sizes: of the rows.
        steps: that count, of each program.
        threads: of each program.
        done: called after each step that counts.
        with_trl: measure TRL's trainer too.

    Raises:
        MissingError: a model or the prompts are not there.
    """
    with _prepared(models, sizes) as (prepared, folder):

        def program(name: str, function: str, *args: Any) -> Program:
            return Program(name, function, (prepared, *args), threads=threads)

        programs = [
            program(PADDED, f"{PROGRAMS}.bare_padded"),
            program(PACKED, f"{PROGRAMS}.bare_packed"),
            program(OURS, f"{PROGRAMS}.replay", str(folder / "ours"), LEARNING),
            program(ROLLOUT, f"{PROGRAMS}.roll_out"),
            program(SCORE, f"{PROGRAMS}.score"),
        ]
        if with_trl:
            programs.append(program(TRL, f"{TRL_PROGRAM}.trl", str(folder / "trl"), LEARNING))
        taken = take_turns(programs, steps, done)
    pairs = [(OURS, PADDED), (OURS, PACKED), *([(TRL, OURS)] if with_trl else [])]
    return StepTable(
        programs=_programs(taken, prepared),
        ratios=_ratios(taken, pairs),
        amortised=_amortised(taken),
    )


def bench_ranks(
    models: Path, sizes: Sizes, steps: int, threads: int, done: Callable[[], None]
) -> StepTable:
    """Measure our trainer in one process and in two, with as many threads together, and in
    bfloat16; arguments are those of `bench_steps`."""
    each = max(1, threads // 2)
    with _prepared(models, sizes) as (prepared, folder):

        def program(name: str, world: int, **settings: Any) -> Program:
            output = str(folder / name.replace(" ", "-"))
            args = (prepared, output, LEARNING | settings)
            count = threads if world == 1 else each
            return Program(name, f"{PROGRAMS}.replay", args, world=world, threads=count)

        one, half = program("one process", 1), program("bfloat16", 1, bf16=True)
        two, shards = program("two processes", 2), program("two, sharded", 2, parallel="fsdp")
        taken = take_turns([one, two, shards, half], steps, done)
    pairs = [(other.name, one.name) for other in (two, shards, half)]
    return StepTable(
        programs=_programs(taken, prepared), ratios=_ratios(taken, pairs), amortised=[]
    )


@contextmanager
def _prepared(models: Path, sizes: Sizes) -> Iterator[tuple[Prepared, Path]]:
    with TemporaryDirectory() as folder:
        yield alone(prepare, models, Path(folder), sizes), Path(folder)


def _programs(taken: dict[str, list[Notes]], prepared: Prepared) -> list[StepFigures]:
    rows = zip(prepared.prompts, prepared.completions, strict=True)
    tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
    found = []
    for name, notes in taken.items():
        seconds = _each(notes, "seconds")
        found.append(
            StepFigures(
                name=name,
                seconds=median(seconds),
                least_s=min(seconds),
                most_s=max(seconds),
                tokens_s=tokens / median(seconds),
                steps=len(seconds),
                generate_s=_median(notes, "generate_s"),
                wait_s=_median(notes, "wait_s"),
            )
        )
    return found


def _ratios(taken: dict[str, list[Notes]], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    return {
        f"{first} / {second}": median(
            one / other
            for one, other in zip(
                _each(taken[first], "seconds"), _each(taken[second], "seconds"), strict=True
            )
        )
        for first, second in pairs
    }


def _amortised(taken: dict[str, list[Notes]]) -> list[Amortised]:
    rollout, score, step = (
        median(_each(taken[name], "seconds")) for name in (ROLLOUT, SCORE, OURS)
    )
    live = _median(taken[TRL], "seconds") if TRL in taken else None
    costs = {replays: (rollout + score) / replays + step for replays in REPLAYS}
    return [
        Amortised(replays=replays, seconds=cost, trl_ratio=None if live is None else live / cost)
        for replays, cost in costs.items()
    ]


def _each(notes: list[Notes], name: str) -> list[float]:
    return [note[name] for note in notes]


def _median(notes: list[Notes], name: str) -> float | None:
    return median(_each(notes, name)) if all(name in note for note in notes) else None
