"""What a quality study found: a table of final distances and times, and its curves as a picture."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from stillroom.tools.bench_quality_cells import COLLAPSE, OBJECTIVES, TRL, Cell, Study
from stillroom.tools.render import print_table, say

Curves = dict[Cell, list[dict[str, Any]]]
COLUMNS = (
    "method",
    "objective",
    "seeds",
    "reuse",
    "forward KL, own text",
    "reverse KL, own text",
    "forward KL, teacher's text",
    "reverse KL, teacher's text",
    "own tail mass",
    "wall s",
    "CPU s",
    "scored positions",
    "share of TRL's wall s",
    "share of TRL's CPU s",
)
JUDGED = {"forward": "forward_kl_nats", "jsd": "forward_kl_nats", "reverse": "reverse_kl_nats"}
"""The measure, on the student's own text, by which an objective has reached what TRL reached."""


@dataclass(frozen=True, slots=True)
class Line:
    """One method and objective: means over the seeds that are finished, after the last update."""

    method: str
    objective: str
    seeds: int
    reuse: float | None
    """Times that a sampled row is replayed; None for TRL's."""
    own_forward_nats: float
    own_reverse_nats: float
    teacher_forward_nats: float
    teacher_reverse_nats: float
    own_tail_mass: float
    """The student's probability outside the teacher's top K and the sampled token."""
    wall_s: float
    """Of all updates: sampling, scoring and training."""
    cpu_s: float
    teacher_positions: float
    share_of_trl_wall: float | None
    """Seconds until the curve of means is where TRL's ends, by those that TRL took to get there;
    None if it never is, or there is nothing to compare with."""
    share_of_trl_cpu: float | None
    """The same of CPU time, which other work on the machine changes less."""


def lines_of(study: Study, curves: Curves) -> list[Line]:
    """The table, in the order of the cells."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in curves:
        groups[cell.objective, cell.way].append(cell)
    order = [*OBJECTIVES, *COLLAPSE]
    keys = sorted(groups, key=lambda key: order.index(key[0]))
    return [_line(study, curves, groups[key], groups.get((key[0], TRL), [])) for key in keys]


def mean_curve(curves: Curves, cells: Sequence[Cell], get: Callable[[Any], float]) -> list[float]:
    """A measure's mean over cells, measurement by measurement."""
    return [mean(map(get, points)) for points in zip(*(curves[c] for c in cells), strict=True)]


def reached_after(times: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """When a curve first is at or below a value, on straight lines between its points; None if
    never."""
    for i, value in enumerate(values):
        if value <= target:
            if i == 0:
                return times[0]
            share = (values[i - 1] - target) / (values[i - 1] - value)
            return times[i - 1] + share * (times[i] - times[i - 1])
    return None


def print_report(study: Study, curves: Curves) -> None:
    """Print the table."""
    if not curves:
        say("quality: no cell is finished yet")
        return
    rows = [tuple(asdict(line).values()) for line in lines_of(study, curves)]
    print_table(COLUMNS, rows, text=COLUMNS[:2])


def as_json(study: Study, curves: Curves) -> dict[str, Any]:
    """Plain values: the table, and each finished cell's curve."""
    lines = [asdict(line) for line in lines_of(study, curves)]
    return {"table": lines, "curves": {cell.name: points for cell, points in curves.items()}}


def draw(curves: Curves, folder: Path) -> list[Path]:
    """Draw the curves as quality.svg and quality.png: distance on the student's own text by wall
    time above and by updates below, an objective a column.

    Returns:
        The files; none where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    columns: list[tuple[str, ...]] = [*((o,) for o in OBJECTIVES), COLLAPSE]
    figure = Figure(figsize=(4 * len(columns), 7), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False)
    for column, objectives in enumerate(columns):
        for row, (key, label) in enumerate((("wall_s", "wall time, s"), ("updates", "updates"))):
            _plot(axes[row][column], curves, objectives, key)
            axes[row][column].set_xlabel(label)
    axes[0][0].legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"quality.{suffix}" for suffix in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def _plot(axes: Any, curves: Curves, objectives: Iterable[str], key: str) -> None:
    for objective in objectives:
        measure = JUDGED.get(objective, "tail_mass")
        ways = dict.fromkeys(cell.way for cell in curves if cell.objective == objective)
        for way in ways:
            cells = [c for c in curves if (c.way, c.objective) == (way, objective)]
            times = mean_curve(curves, cells, lambda p: p[key])
            values = mean_curve(curves, cells, lambda p, m=measure: p["student"][m])  # type: ignore[misc]
            axes.plot(times, values, marker=".", label=objective if objective in COLLAPSE else way)
        axes.set_title(" and ".join(objectives))
        axes.set_ylabel("its own tail mass" if objective in COLLAPSE else f"{measure} (nats)")
    if any(objective in COLLAPSE for objective in objectives) and axes.lines:
        axes.legend(fontsize="small")


def _line(study: Study, curves: Curves, cells: list[Cell], trl: list[Cell]) -> Line:
    cell, last = cells[0], [curves[cell][-1] for cell in cells]

    def final(get: Callable[[Any], float]) -> float:
        return mean(map(get, last))

    return Line(
        method=cell.way,
        objective=cell.objective,
        seeds=len(cells),
        reuse=study.reuse_of(cell.interval) if cell.interval else None,
        own_forward_nats=final(lambda p: p["student"]["forward_kl_nats"]),
        own_reverse_nats=final(lambda p: p["student"]["reverse_kl_nats"]),
        teacher_forward_nats=final(lambda p: p["teacher"]["forward_kl_nats"]),
        teacher_reverse_nats=final(lambda p: p["teacher"]["reverse_kl_nats"]),
        own_tail_mass=final(lambda p: p["student"]["tail_mass"]),
        wall_s=final(lambda p: p["wall_s"]),
        cpu_s=final(lambda p: p["cpu_s"]),
        teacher_positions=final(lambda p: p["teacher_positions"]),
        share_of_trl_wall=_share(curves, cells, trl, "wall_s"),
        share_of_trl_cpu=_share(curves, cells, trl, "cpu_s"),
    )


def _share(curves: Curves, cells: list[Cell], trl: list[Cell], clock: str) -> float | None:
    if not trl or cells[0].method == TRL:
        return None
    measure = JUDGED[cells[0].objective]
    seeds = {cell.seed for cell in cells} & {cell.seed for cell in trl}
    both = [[cell for cell in group if cell.seed in seeds] for group in (cells, trl)]
    if not seeds:
        return None
    (times, values), (trl_times, trl_values) = (
        (
            mean_curve(curves, group, lambda p: p[clock]),
            mean_curve(curves, group, lambda p: p["student"][measure]),
        )
        for group in both
    )
    found = reached_after(times, values, trl_values[-1])
    theirs = reached_after(trl_times, trl_values, trl_values[-1])
    return None if found is None or not theirs else found / theirs
