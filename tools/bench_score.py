"""`stillroom bench score`: what scoring costs beside the model alone, with transformers and with
vLLM, and whether its memory stays flat."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from stillroom.cache.progress import Progress
from stillroom.cache.teacher import TeacherConfig
from stillroom.cache.vllm_config import VllmConfig
from stillroom.tools.bench_score_front import GOAL_US, FrontEnd, measure_front_end
from stillroom.tools.bench_score_memory import Memory, measure_memory
from stillroom.tools.bench_score_rows import Scored, text_rows
from stillroom.tools.bench_stream import alone
from stillroom.tools.bench_train_rows import Sizes
from stillroom.tools.bench_train_turns import Notes, Program, take_turns
from stillroom.tools.render import print_table, say

PARTS = ("engines", "front", "memory")
PROGRAMS = "stillroom.tools.bench_score_programs"
BARE, OURS = "bare forward, head and top K", "transformers teacher"
PREFILL, THROWN = "vLLM, prompts alone", "vLLM, prompt logprobs thrown away"
VLLM, EXACT = "vLLM teacher", "vLLM teacher, exact tail"
NOTED = {PREFILL: "prefill_s", THROWN: "thrown_away_s", VLLM: "teacher_s"}
"""Figures of one program, which runs one engine."""
SHARES = (
    (OURS, BARE, 0.92),
    (VLLM, THROWN, 0.90),
    (VLLM, PREFILL, None),
    (VLLM, OURS, None),
    (EXACT, VLLM, None),
)
"""A program's speed as a share of another's, and what it should be at least."""
KV_BYTES = 512 << 20
COLUMNS = ("program", "s", "least", "most", "positions/s", "tokens/s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One program over all rows."""

    name: str
    seconds: float
    """The median."""
    least_s: float
    most_s: float
    positions_s: float
    tokens_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How fast a program is beside another: the median over rounds."""

    name: str
    beside: str
    share: float
    goal: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFigures:
    """All of one run; None was not asked for."""

    speeds: list[Speed] | None
    shares: list[Share] | None
    model_share: float | None
    """Of the transformers teacher's time, in which its model ran; the median."""
    front_end: FrontEnd | None
    memory: Memory | None


def bench_score(
    parts: Sequence[str],
    *,
    models: Path,
    sizes: Sizes,
    rounds: int,
    threads: int,
    positions: int,
    with_vllm: bool,
) -> ScoreFigures:
    """Measure scoring.

    Args:
        parts: of `PARTS`.
        models: the folder that the quickstart's `prepare.py` made, for the engines.
        sizes: of the rows that those score.
        rounds: that are measured of each program.
        threads: of each.
        positions: over which memory is looked at.
        with_vllm: measure vLLM too, where it is installed.

    Raises:
        MissingError: models or prompts are not there.
        InputError: there is too little text for the rows.
    """
    with_vllm = with_vllm and find_spec("vllm") is not None
    taken: dict[str, list[Notes]] = {}
    count = (4 if with_vllm else 2) * rounds if "engines" in parts else 0
    count += len({"front", "memory"}.intersection(parts))
    with Progress("bench", count, "figures") as progress:
        if "engines" in parts:
            taken = _run_engines(
                models, sizes, rounds, threads, progress.advance, with_vllm=with_vllm
            )
        front = memory = None
        if "front" in parts:
            front = alone(measure_front_end)
            progress.advance()
        if "memory" in parts:
            memory = alone(measure_memory, positions, sizes.topk)
            progress.advance()
    return ScoreFigures(
        speeds=_speeds(taken, sizes) if taken else None,
        shares=_shares(taken) if taken else None,
        model_share=_model_share(taken[OURS]) if taken else None,
        front_end=front,
        memory=memory,
    )


def as_json(figures: ScoreFigures) -> dict[str, Any]:
    """Plain values."""
    found = {name: value for name, value in asdict(figures).items() if value is not None}
    if figures.memory is not None:
        found["memory"]["growth_mb"] = figures.memory.growth_mb
    return found


def print_figures(figures: ScoreFigures) -> None:
    """Print a table, and what follows from it."""
    if figures.speeds is not None:
        rows = [
            (
                row.name,
                round(row.seconds, 3),
                round(row.least_s, 3),
                round(row.most_s, 3),
                round(row.positions_s),
                round(row.tokens_s),
            )
            for row in figures.speeds
        ]
        print_table(COLUMNS, rows, text=("program",))
    for share in figures.shares or []:
        goal = "" if share.goal is None else f" (goal: at least {share.goal:.0%})"
        say(f"{share.name}: {share.share:.1%} of the speed of {share.beside}{goal}")
    if figures.model_share is not None:
        say(f"{OURS}: its model ran {figures.model_share:.1%} of the time")
    front, memory = figures.front_end, figures.memory
    if front is not None:
        spread = f"{front.least_us:.2f} to {front.most_us:.2f}"
        say(
            f"scores of an engine's arrays at K = {front.topk}: {front.microseconds:.2f} us of "
            f"processor time a position ({spread}; goal: at most {GOAL_US:.0f})"
        )
    if memory is not None:
        say(
            f"memory over {memory.positions:,} positions at K = {memory.topk}: "
            f"{memory.first_mb:.0f} MiB in the first tenth, {memory.growth_mb:+.0f} MiB after it"
        )


def _run_engines(
    models: Path,
    sizes: Sizes,
    rounds: int,
    threads: int,
    done: Callable[[], None],
    *,
    with_vllm: bool,
) -> dict[str, list[Notes]]:
    """Notes of each program's rounds, by the names that are printed."""
    rows, teacher = text_rows(models, sizes), str(models / "teacher")
    length = sizes.prompt + sizes.completion
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": KV_BYTES, "max_model_len": length + 1}
    own = TeacherConfig(model=teacher, device="cpu")
    vllm = TeacherConfig(model=teacher, backend="vllm", vllm=VllmConfig(engine_args=engine))

    def program(name: str, function: str, config: TeacherConfig) -> Program:
        scored = Scored(rows, config, sizes.topk, threads)
        return Program(name, f"{PROGRAMS}.{function}", (scored,), threads=threads)

    programs = [
        program(BARE, "bare_forward", own),
        program(OURS, "transformers_teacher", own),
    ]
    if with_vllm:
        programs += [program(VLLM, "vllm_plain", vllm), program(EXACT, "vllm_exact", vllm)]
    taken = take_turns(programs, rounds, done)
    together = taken.pop(VLLM, [])
    if together:
        for name, figure in NOTED.items():
            taken[name] = [{"seconds": notes[figure]} for notes in together]
    return taken


def _speeds(taken: dict[str, list[Notes]], sizes: Sizes) -> list[Speed]:
    positions = sizes.rows * sizes.completion
    tokens = sizes.rows * (sizes.prompt + sizes.completion)
    found = []
    for name, notes in taken.items():
        seconds = [note["seconds"] for note in notes]
        middle = median(seconds)
        found.append(
            Speed(
                name=name,
                seconds=middle,
                least_s=min(seconds),
                most_s=max(seconds),
                positions_s=positions / middle,
                tokens_s=tokens / middle,
            )
        )
    return found


def _shares(taken: dict[str, list[Notes]]) -> list[Share]:
    return [
        Share(
            name=name,
            beside=beside,
            goal=goal,
            share=median(
                other["seconds"] / own["seconds"]
                for own, other in zip(taken[name], taken[beside], strict=True)
            ),
        )
        for name, beside, goal in SHARES
        if name in taken and beside in taken
    ]


def _model_share(notes: list[Notes]) -> float:
    return median(note["model_s"] / note["seconds"] for note in notes)
