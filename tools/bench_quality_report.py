"""What a quality study found: a table of final distances and times, and its curves as a picture."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from stillroom.tools.bench_quality_cells import COLLAPSE, OBJECTIVES, TRL, Cell, Study
from stillroom.tools.render import print_table, say

TEXTS = {"student": "own text", "teacher": "teacher's text"}
ROWS = (
    ("cpu_s", "CPU time, s", "student"),
    ("updates", "updates", "student"),
    ("updates", "updates", "teacher"),
)
"""Of the picture: what is along, its name, and the text that is measured on."""
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
    "spread over seeds, own text",
    "spread, teacher's text",
    "own tail mass",
    "wall s",
    "CPU s",
    "scored positions",
    "share of TRL's wall s, own text",
    "share of CPU s, own text",
    "share of CPU s, teacher's text",
)
JUDGED = {"forward": "forward_kl_nats", "jsd": "forward_kl_nats", "reverse": "reverse_kl_nats"}
"""The measure by which an objective has reached what TRL reached, on either text."""
RIVAL = dict.fromkeys(COLLAPSE, "reverse")
"""The objective of TRL's that others are compared with; for those that are not here, their own."""


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
    own_spread_nats: float
    """The most less the least of the judged measure over seeds, on the student's own text."""
    teacher_spread_nats: float
    """The same on the teacher's."""
    own_tail_mass: float
    """The student's probability outside the teacher's top K and the sampled token."""
    wall_s: float
    """Of all updates: sampling, scoring and training."""
    cpu_s: float
    teacher_positions: float
    share_of_trl_wall: float | None
    """Seconds until the curve of means is where TRL's ends, by those that TRL took to get there, on
    the student's own text; None if it never is, or there is nothing to compare with."""
    share_of_trl_cpu: float | None
    """The same of CPU time, which other work on the machine changes less."""
    share_of_trl_cpu_teacher: float | None
    """The same of CPU time on the teacher's text, which is the same for all and less noisy."""


def lines_of(study: Study, curves: Curves) -> list[Line]:
    """The table, in the order of the cells."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in curves:
        groups[cell.objective, cell.way].append(cell)
    order = [*OBJECTIVES, *COLLAPSE]
    keys = sorted(groups, key=lambda key: order.index(key[0]))
    return [
        _line(study, curves, groups[key], groups.get((RIVAL.get(key[0], key[0]), TRL), []))
        for key in keys
    ]


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
    """Draw the curves as quality.svg and quality.png, an objective a column: distance on the
    student's own text by CPU time, by updates, and on the teacher's text by updates. Lines are
    means over seeds, and bands go from the least to the most.

    Beside reverse KL stands that over buckets with the tail; the last column has its tail mass and
    that of the truncated one.

    Returns:
        The files; none where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    columns: list[tuple[str, ...]] = [*((o,) for o in OBJECTIVES), COLLAPSE]
    figure = Figure(figsize=(4 * len(columns), 3.5 * len(ROWS)), layout="constrained")
    axes = figure.subplots(len(ROWS), len(columns), squeeze=False)
    for column, objectives in enumerate(columns):
        for row, (key, label, text) in enumerate(ROWS):
            if objectives == COLLAPSE:
                _plot_tail_mass(axes[row][column], curves, key, text)
            else:
                _plot(axes[row][column], curves, objectives[0], key, text)
            axes[row][column].set_xlabel(label)
    for first in axes[0]:
        if first.lines:
            first.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"quality.{suffix}" for suffix in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=100)
    return paths


def _plot(axes: Any, curves: Curves, objective: str, key: str, text: str) -> None:
    """The judged measure of an objective's cells, and of those that have the same rival."""
    measure = JUDGED[objective]
    for shown in (objective, *COLLAPSE[:1]) if objective == "reverse" else (objective,):
        for way in dict.fromkeys(cell.way for cell in curves if cell.objective == shown):
            label = way if shown == objective else f"{way}, {shown}"
            _curve(axes, curves, (way, shown), key, lambda p: p[text][measure], label)
    axes.set_title(f"{objective}, {TEXTS[text]}", fontsize="small")
    axes.set_ylabel(f"{measure} (nats)")


def _plot_tail_mass(axes: Any, curves: Curves, key: str, text: str) -> None:
    for objective in COLLAPSE:
        for way in dict.fromkeys(cell.way for cell in curves if cell.objective == objective):
            _curve(axes, curves, (way, objective), key, lambda p: p[text]["tail_mass"], objective)
    axes.set_title(f"{' and '.join(COLLAPSE)}, {TEXTS[text]}", fontsize="small")
    axes.set_ylabel("the student's tail mass")


def _curve(
    axes: Any,
    curves: Curves,
    group: tuple[str, str],
    key: str,
    get: Callable[[Any], float],
    label: str,
) -> None:
    """A line of means, and a band from the least to the most, over the seeds of a way and
    objective."""
    cells = [cell for cell in curves if (cell.way, cell.objective) == group]
    times = mean_curve(curves, cells, lambda p: p[key])
    points = list(zip(*[[get(p) for p in curves[cell]] for cell in cells], strict=True))
    (line,) = axes.plot(times, list(map(mean, points)), marker=".", label=label)
    low, high = list(map(min, points)), list(map(max, points))
    axes.fill_between(times, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _line(study: Study, curves: Curves, cells: list[Cell], trl: list[Cell]) -> Line:
    cell, last = cells[0], [curves[cell][-1] for cell in cells]

    def final(get: Callable[[Any], float]) -> float:
        return mean(map(get, last))

    def spread(text: str) -> float:
        judged = JUDGED[RIVAL.get(cell.objective, cell.objective)]
        values = [point[text][judged] for point in last]
        return float(max(values) - min(values))

    return Line(
        method=cell.way,
        objective=cell.objective,
        seeds=len(cells),
        reuse=study.reuse_of(cell.interval) if cell.interval else None,
        own_forward_nats=final(lambda p: p["student"]["forward_kl_nats"]),
        own_reverse_nats=final(lambda p: p["student"]["reverse_kl_nats"]),
        teacher_forward_nats=final(lambda p: p["teacher"]["forward_kl_nats"]),
        teacher_reverse_nats=final(lambda p: p["teacher"]["reverse_kl_nats"]),
        own_spread_nats=spread("student"),
        teacher_spread_nats=spread("teacher"),
        own_tail_mass=final(lambda p: p["student"]["tail_mass"]),
        wall_s=final(lambda p: p["wall_s"]),
        cpu_s=final(lambda p: p["cpu_s"]),
        teacher_positions=final(lambda p: p["teacher_positions"]),
        share_of_trl_wall=_share(curves, cells, trl, "wall_s", "student"),
        share_of_trl_cpu=_share(curves, cells, trl, "cpu_s", "student"),
        share_of_trl_cpu_teacher=_share(curves, cells, trl, "cpu_s", "teacher"),
    )


def _share(
    curves: Curves, cells: list[Cell], trl: list[Cell], clock: str, text: str
) -> float | None:
    if not trl or cells[0].method == TRL:
        return None
    measure = JUDGED[trl[0].objective]
    seeds = {cell.seed for cell in cells} & {cell.seed for cell in trl}
    both = [[cell for cell in group if cell.seed in seeds] for group in (cells, trl)]
    if not seeds:
        return None
    (times, values), (trl_times, trl_values) = (
        (
            mean_curve(curves, group, lambda p: p[clock]),
            mean_curve(curves, group, lambda p: p[text][measure]),
        )
        for group in both
    )
    found = reached_after(times, values, trl_values[-1])
    theirs = reached_after(trl_times, trl_values, trl_values[-1])
    return None if found is None or not theirs else found / theirs
