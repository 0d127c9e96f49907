"""`stillroom import`: rollouts in files that other systems wrote become parts of a cache."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from stillroom.cache.add_rollouts import (
    PART_POSITIONS,
    AddReport,
    PlannedParts,
    add_parts,
    plan_parts,
)
from stillroom.cache.checked_rollouts import CheckedRollouts, check_rollouts
from stillroom.cache.errors import ConfigError, StorageError
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.tools.layouts import LAYOUTS
from stillroom.tools.render import plain, print_json, say
from stillroom.tools.rollout_files import read_batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """Store rollouts that another system made, as parts to be scored. Every row of every file is
    checked before anything is written; the same file again adds nothing. Rows that bring a
    rollout_id are known again one by one, so a file may have grown since; rows without one only as
    a whole part of equal rows."""

    root: Positional[str]
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    rollouts: tuple[str, ...]
    """Files of rollouts: .parquet, .jsonl or .jsonl.gz, one row a sequence."""
    columns: str | None = None
    """Columns to take, OURS=THEIRS,...: for example prompt=prompt_ids,completion=response_ids. None
    takes all, under a part's own names."""
    layout: str | None = None
    """Instead of columns: verl, verl-batch, sglang, vllm or trl, whose records the files hold."""
    policy: int | None = None
    """Policy version that sampled them; None is unknown, and retired like policy 0."""
    temperature: float | None = None
    """Temperature that the behaviour logprobs are at: 1 for those of raw logits, else that of the
    sampling. None is unknown: their drift is not measured then."""
    top_p: float | None = None
    """Of the sampling; recorded only."""
    top_k: int | None = None
    """Of the sampling; recorded only."""
    positions_per_part: int = PART_POSITIONS
    """Scored tokens of a part, about; >= 1. Another value stores rows without ids again."""
    skip_bad: str | None = None
    """New file for the rows that cannot be scored or have the id of another rollout, one line of
    JSON each with file, row and reason; they are left out. None refuses all files if one row is
    bad."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check what can be checked without the files."""
        if not self.rollouts:
            raise ConfigError("rollouts", "at least one file", "none", "Name one.")
        if len(set(self.rollouts)) < len(self.rollouts):
            got = ", ".join(self.rollouts)
            raise ConfigError("rollouts", "every file once", got, "Name each once.")
        if self.layout is not None and self.layout not in LAYOUTS:
            expected = f"one of {', '.join(LAYOUTS)}"
            raise ConfigError("layout", expected, repr(self.layout), "Or map names with --columns.")
        if self.layout is not None and self.columns is not None:
            raise ConfigError("columns", "columns or a layout", "both", "Leave one out.")


def run_import(job: Import) -> int:
    """`stillroom import`."""
    if job.skip_bad is not None:
        _check_new(local_path(job.skip_bad))
    cache = Cache.open(job.root)
    columns = None if job.columns is None else parse_columns(job.columns)
    layout = None if job.layout is None else LAYOUTS[job.layout]
    checked = [
        check_rollouts(
            read_batches(local_path(file), columns, layout),
            cache.identity,
            file,
            skip_bad=job.skip_bad is not None,
        )
        for file in job.rollouts
    ]
    sampler = {"temperature": job.temperature, "top_p": job.top_p, "top_k": job.top_k}
    plans = plan_parts(
        cache,
        checked,
        policy_version=job.policy,
        sampler=sampler,
        positions_per_part=job.positions_per_part,
        skip_bad=job.skip_bad is not None,
    )
    if job.skip_bad is not None:
        _write_left_out(local_path(job.skip_bad), checked, plans)
    planned = zip(job.rollouts, plans, strict=True)
    reports = {file: add_parts(cache, plan) for file, plan in planned}
    if job.json:
        files = {file: asdict(report) for file, report in reports.items()}
        print_json({"root": cache.storage.root, "files": files})
    else:
        for file, report in reports.items():
            _print_report(file, report)
    return 0


def parse_columns(text: str) -> dict[str, str]:
    """A mapping OURS=THEIRS,... of column names.

    Raises:
        ConfigError: it is none, or names a column twice.
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(columns) < len(pairs) or not all(o and t for o, t in columns.items()):
        do = "For example prompt=prompt_ids,completion=response_ids."
        raise ConfigError("columns", "OURS=THEIRS,..., each of ours once", repr(text), do)
    return columns


def _check_new(path: Path) -> None:
    """What a person named by mistake is not written over."""
    if os.path.lexists(path):
        raise ConfigError("skip_bad", "a file that is not there yet", str(path), "Name another.")
    if not path.parent.is_dir():
        got = f"no folder {path.parent}"
        raise ConfigError("skip_bad", "a file in a folder that is there", got, "Make the folder.")


def _write_left_out(
    path: Path, checked: Sequence[CheckedRollouts], plans: Sequence[PlannedParts]
) -> None:
    lines = [
        json.dumps({"file": one.where, "row": row, "reason": reason}) + "\n"
        for one, plan in zip(checked, plans, strict=True)
        for row, reason in plan.left_out
    ]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        do = "Name another file; nothing was added."
        raise StorageError(str(path), "a file that can be written", str(error), do) from error
    for one, plan in zip(checked, plans, strict=True):
        if plan.left_out:
            count, rows = len(plan.left_out), len(one.table) + len(one.left_out)
            text = f"import: {one.where}: {count:,} of {rows:,} rows left out, see {path}"
            print(plain(text), file=sys.stderr)


def _print_report(file: str, report: AddReport) -> None:
    there = f", {len(report.present):,} were there" if report.present else ""
    say(
        f"import: {file}: {len(report.added):,} parts added{there}; {report.rollouts:,} rollouts, "
        f"{report.positions:,} positions to score"
    )
