"""The process of one cell of the quality study: it trains and measures, and leaves one JSON file
when it is through."""

import os
import shutil
import sys
import threading
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.tools.bench_quality_cells import TRL, Cell, Study
from stillroom.train.durable import write_file

HELD_OUT, START = "held_out.json", "start.json"
"""What the teacher wrote to be measured on; and the measurement of the initial student."""


def prepare(study: Study, output: Path) -> None:
    """Write what all cells share, as far as it is not there: the teacher's held-out text, and how
    far the initial student is from the teacher."""
    _begin(study)
    from stillroom.tools.bench_quality_held_out import HeldOut, Models, write_held_out

    if not (output / HELD_OUT).exists():
        write_held_out(study, output / HELD_OUT)
    models = Models.of(study)
    held_out = HeldOut(study, models, output / HELD_OUT)
    write_file(output / START, jsonfile.dump(held_out.measure()))


def run_cell(study: Study, cell: Cell, output: Path) -> None:
    """Train a cell and write `cells/<name>.json`: a list of measurements, the initial student's
    first, each with updates, seconds and scored positions until then."""
    _begin(study)
    from stillroom.tools.bench_quality_clock import Clock
    from stillroom.tools.bench_quality_held_out import HeldOut, Models

    models, clock = Models.of(study), Clock()
    held_out = HeldOut(study, models, output / HELD_OUT)
    start = jsonfile.load((output / START).read_bytes(), START)
    curve = [_point(0, 0, clock, start)]

    def measure(updates: int, positions: int, weights: Any) -> None:
        curve.append(_point(updates, positions, clock, held_out.measure(weights)))
        _say(cell, curve[-1])

    folder = output / "work" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if cell.method == TRL:
        from stillroom.tools.bench_quality_trl import trl_cell

        trl_cell(study, cell, models, folder, clock, measure)
    else:
        from stillroom.tools.bench_quality_replay import replay_cell

        replay_cell(study, cell, models, folder, clock, measure)
    write_file(result_path(output, cell), jsonfile.dump({"curve": curve, "load": os.getloadavg()}))
    shutil.rmtree(folder)


def result_path(output: Path, cell: Cell) -> Path:
    """The file that a finished cell leaves."""
    return output / "cells" / f"{cell.name}.json"


def _begin(study: Study) -> None:
    """In a process of its own: end with the study's, however that ends, and leave stdout to it. Use
    so many threads, and look nowhere for models."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(study.threads)


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _point(updates: int, positions: int, clock: Any, measured: dict[str, Any]) -> dict[str, Any]:
    taken = {"wall_s": clock.wall_s, "cpu_s": clock.cpu_s, "teacher_positions": positions}
    return {"updates": updates, **taken, **measured}


def _say(cell: Cell, point: dict[str, Any]) -> None:
    own = point["student"]
    print(
        f"  {cell.name}: {point['updates']} updates, {point['wall_s']:.0f} s, KL on its own text"
        f" {own['forward_kl_nats']:.3f} forward, {own['reverse_kl_nats']:.3f} reverse",
        file=sys.stderr,
    )
