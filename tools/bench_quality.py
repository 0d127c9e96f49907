"""The quality study: many small training runs, each in a process of its own, whose results are
files; it goes on where it was ended, over days if need be."""

import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import MismatchError, MissingError
from stillroom.tools.bench_only import chosen
from stillroom.tools.bench_quality_cell import HELD_OUT, START, prepare, result_path, run_cell
from stillroom.tools.bench_quality_cells import TRL, Cell, Study, cells_of
from stillroom.train.durable import write_file

STUDY = "study.json"


def run_study(
    study: Study,
    output: Path,
    *,
    only: Sequence[str] = (),
    with_trl: bool = True,
) -> list[Cell]:
    """Run the cells that are not finished, one after another.

    Args:
        study: the settings; those of an output stay what they were at first.
        output: folder of the results.
        only: patterns of the cells to run; all without any.
        with_trl: whether TRL's are run.

    Returns:
        Cells whose process ended without a result.

    Raises:
        ConfigError: a pattern matches no cell.
        MismatchError: the output is of a study with other settings.
        MissingError: what all cells share could not be made.
    """
    cells = [c for c in chosen(list(cells_of(study)), only) if with_trl or c.method != TRL]
    _keep_settings(study, output)
    missing = [cell for cell in cells if not result_path(output, cell).exists()]
    _say(f"quality: {len(cells) - len(missing)} of {len(cells)} cells are finished, in {output}")
    if not missing:
        return []
    if not (output / START).exists() and not _in_a_process(prepare, study, output):
        do = "See the message above."
        raise MissingError(str(output), f"{HELD_OUT} and {START}", "none", do)
    failed = []
    for number, cell in enumerate(missing, start=1):
        start = time.perf_counter()
        done = _in_a_process(run_cell, study, cell, output)
        if not done:
            failed.append(cell)
        what = f"{time.perf_counter() - start:.0f} s" if done else "failed"
        _say(f"{number} of {len(missing)}: {cell.name}: {what}")
    return failed


def finished(study: Study, output: Path) -> dict[Cell, list[dict[str, Any]]]:
    """Curves of the cells that are finished.

    Raises:
        MismatchError: the output is of a study with other settings.
        CorruptError: a result is damaged.
    """
    _keep_settings(study, output)
    paths = {cell: result_path(output, cell) for cell in cells_of(study)}
    return {
        cell: jsonfile.load(path.read_bytes(), str(path))["curve"]
        for cell, path in paths.items()
        if path.exists()
    }


def _keep_settings(study: Study, output: Path) -> None:
    path, ours = output / STUDY, study.as_json()
    if not path.exists():
        write_file(path, jsonfile.dump(ours))
        return
    first = jsonfile.load(path.read_bytes(), str(path))
    differing = [key for key in ours if first.get(key) != ours[key]]
    if differing:
        expected, got = (
            ", ".join(f"{key} = {values.get(key)!r}" for key in differing)
            for values in (first, ours)
        )
        do = "Use those settings, or another output."
        raise MismatchError(str(path), expected, got, do)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _in_a_process(work: Callable[..., None], *args: Any) -> bool:
    """Whether a process of its own did the work; what it says goes where ours does."""
    process = get_context("spawn").Process(target=work, args=args)
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    return process.exitcode == 0
