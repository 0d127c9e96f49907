"""`stillroom estimate`: positions, bytes, requests and teacher time of a scoring job before any of
them is spent. Nothing is written."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pyarrow as pa
from tyro.conf import Suppress

from stillroom.cache.errors import ConfigError
from stillroom.cache.identity import Identity
from stillroom.cache.load_teacher import inspect_teacher, load_teacher
from stillroom.cache.progress import duration
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.storage import Storage, local_path
from stillroom.cache.store import IDENTITY_PATH, Cache
from stillroom.cache.teacher import ScoreSpec, Teacher, longest_row_of
from stillroom.tools.estimate_costs import Estimate, estimate
from stillroom.tools.estimate_trial import TRIALS, try_teacher
from stillroom.tools.estimate_work import (
    Counted,
    Work,
    as_rollouts,
    count_planned,
    count_table,
    count_unscored,
)
from stillroom.tools.jobs import RolloutJob, ScoreJob
from stillroom.tools.render import print_json, say
from stillroom.tools.score_settings import new_identity, teacher_of
from stillroom.train.settings import load_yaml

TABLES = 4
"""Parts whose rollouts a trial draws from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateJob(ScoreJob):
    """Say what a scoring job takes before it runs: positions, bytes, requests and teacher time. The
    settings are those of `score`; nothing is written. What says how `score` runs may stand in the
    file and changes nothing: accept_numerics, rank, world_size, watch, watch_s, engine and ray."""

    accept_numerics: Annotated[bool, Suppress] = False
    rank: Annotated[int | None, Suppress] = None
    world_size: Annotated[int | None, Suppress] = None
    watch: Annotated[bool, Suppress] = False
    watch_s: Annotated[float, Suppress] = 30.0
    engine: Annotated[str, Suppress] = "local"
    ray: Annotated[RayConfig, Suppress] = field(default_factory=RayConfig)
    rollout: str | None = None
    """YAML file of a rollout job that runs before: what it samples, with completions as long as
    they may be, is counted too."""
    trial_rows: int = 48
    """Rollouts that the teacher scores for a trial; 0 leaves it out."""
    count_parts: int = 64
    """Parts that are read to count them, spread over all; the others' figures go by their
    bytes. >= 1."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        ScoreJob.__post_init__(self)
        if self.trial_rows < 0 or self.count_parts < 1:
            got = f"{self.trial_rows} and {self.count_parts}"
            raise ConfigError("trial_rows, count_parts", "at least 0 and 1", got, "Raise them.")


def run_estimate(job: EstimateJob) -> int:
    """`stillroom estimate`."""
    found = _estimate(job)
    if job.json:
        print_json(found.as_json())
    else:
        _print(found)
    return 0


def _estimate(job: EstimateJob) -> Estimate:
    planned_ahead = job.rollout is not None and job.again is None
    no_cache = planned_ahead and not Storage(job.root).exists(IDENTITY_PATH)
    cache = None if no_cache else Cache.open(job.root)
    if cache is None:
        files, id_map = inspect_teacher(job.teacher), None
        identity = new_identity(job, files)
    else:
        files, id_map = teacher_of(job, cache)
        identity = cache.identity
    counted = Counted()
    if cache is not None:
        counted = count_unscored(cache, job.count_parts, TABLES, job.again)
    planned = Work()
    prompts: list[np.ndarray] = []
    if job.rollout is not None:
        planning = _rollout_job(job.rollout, job.root)
        planned, prompts = count_planned(cache, identity, planning, files)
    tables, trial_on = _trial_rows(cache, identity, counted, as_rollouts(prompts))
    trial = None
    if job.trial_rows and tables:
        teacher = load_teacher(files, job.teacher, id_map, ScoreSpec.of(identity))
        if job.too_long == "skip":
            tables = _readable(tables, teacher, identity)
        trial = try_teacher(teacher, tables, identity, job.trial_rows) if tables else None
    return estimate(cache, counted.work, planned, trial, "" if trial is None else trial_on)


def _rollout_job(path: str, root: str) -> RolloutJob:
    job: RolloutJob = load_yaml(RolloutJob, path)
    theirs, ours = (_place(each) for each in (job.root, root))
    if theirs != ours:
        do = "Name the same cache in both."
        raise ConfigError(f"{path}, key 'root'", f"the root {root}", job.root, do)
    return job


def _place(root: str) -> str:
    storage = Storage(root)
    return str(local_path(storage.root).resolve()) if storage.is_local else root.rstrip("/")


def _readable(tables: list[pa.Table], teacher: Teacher, identity: Identity) -> list[pa.Table]:
    """Those of which the teacher can read every row."""
    longest = longest_row_of(teacher)
    if longest is None:
        return tables
    return [t for t in tables if count_table(t, identity).longest_tokens <= longest]


def _trial_rows(
    cache: Cache | None, identity: Identity, counted: Counted, prompts: pa.Table
) -> tuple[list[pa.Table], str]:
    """Rollouts for a trial: of parts to be scored, else of others, else prompts; and which."""
    if counted.tables:
        return counted.tables, "rollouts that are to be scored"
    parts = [] if cache is None else cache.parts()[-TABLES:]
    if cache is not None and parts:
        return [cache.read_part(part)[0] for part in parts], "rollouts that are scored already"
    return ([prompts] if len(prompts) else []), "the prompts, which are shorter than rollouts"


def _print(found: Estimate) -> None:
    work, planned, requests = found.unscored, found.planned, found.requests
    by_bytes = work.counted_parts < work.parts
    about = f", about: {work.counted_parts} of the parts were read" if by_bytes else ""
    say(f"to be scored: {_counts(work)}{about}")
    if planned.parts:
        say(f"to be sampled before: {_counts(planned)}, at most")
    if found.bytes_per_position is None:
        say("bytes: not known without a shard or a trial")
    else:
        total = found.bytes_per_position * found.positions
        each = f"{found.bytes_per_position:.1f} a position ({found.bytes_from})"
        say(f"bytes: {total / 1e6:,.1f} MB, {each}")
    say(
        f"requests to an object store: {requests.writes:,} writes, {requests.reads:,} reads, "
        f"{requests.lists:,} lists"
    )
    if found.seconds is None or found.trial is None:
        say("teacher: not known without a trial")
        return
    trial = found.trial
    least, likely, most = map(duration, found.seconds)
    rate = trial.positions / trial.tokens / trial.middle_s
    say(
        f"teacher: {likely} ({least} to {most}) for one worker, {rate:,.0f} positions/s, "
        f"{1 / trial.middle_s:,.0f} tokens/s"
    )
    trials = min(TRIALS, trial.rows)
    say(f"the trial: {trial.rows} of {found.trial_on}, {trial.tokens:,} tokens, in {trials} pieces")


def _counts(work: Work) -> str:
    return (
        f"{work.parts:,} parts, {work.rollouts:,} rollouts, {work.positions:,} positions, "
        f"{work.tokens:,} tokens to read"
    )
