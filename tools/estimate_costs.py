"""From work and a trial to what a scoring job takes: bytes, requests to the storage, and seconds of
the teacher."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.cache.claims import RENEW_EVERY_S
from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.remote_objects import GET_BYTES
from stillroom.cache.store import Cache
from stillroom.tools.estimate_trial import Trial
from stillroom.tools.estimate_work import Work

COMMITS = 16
"""Newest shards whose bytes a position are averaged."""
PART_WRITES, PART_READS = 5, 9
"""Requests of a part. Written are its claim, twice, shard, manifest and commit; read are its
rollouts, its claim, and whether it is still to be scored."""
JOB_WRITES, JOB_READS, JOB_LISTS = 3, 4, 9
"""Requests of the job: the storage's trial, identity and canary, and what is there, twice."""
LISTED = 1000
"""Objects of one request for a listing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Requests to an object store, of one worker that does all; retries come on top."""

    writes: int
    reads: int
    lists: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a job takes; None is not known."""

    unscored: Work
    planned: Work
    bytes_per_position: float | None
    bytes_from: str
    """Where that comes from; empty where nothing tells."""
    requests: Requests
    seconds: tuple[float, float, float] | None
    """Of the teacher: least, likely and most, by the range of the trials."""
    trial: Trial | None
    trial_on: str
    """What the trial scored; empty without one."""

    @property
    def positions(self) -> int:
        """Unscored and planned."""
        return self.unscored.positions + self.planned.positions

    @property
    def stored_bytes(self) -> float | None:
        """Of all shards."""
        each = self.bytes_per_position
        return None if each is None else each * self.positions

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        sums = {"positions": self.positions, "stored_bytes": self.stored_bytes}
        return {**sums, **asdict(self)}


def estimate(
    cache: Cache | None, unscored: Work, planned: Work, trial: Trial | None, trial_on: str
) -> Estimate:
    """Sum up.

    Args:
        cache: the cache, if there is one yet; only read.
        unscored: parts that are to be scored.
        planned: what is to be sampled before, at most.
        trial: of the teacher, if it was tried.
        trial_on: what it scored then.
    """
    each, source = None if cache is None else _bytes_per_position(cache), "newest shards"
    if each is None:
        each, source = (None, "") if trial is None else (trial.bytes_per_position, "the trial")
    tokens, seconds = unscored.tokens + planned.tokens, None
    if trial is not None:
        times = trial.seconds_per_token
        seconds = tokens * times[0], tokens * trial.middle_s, tokens * times[-1]
    return Estimate(
        unscored=unscored,
        planned=planned,
        bytes_per_position=each,
        bytes_from=source,
        requests=_requests(cache, unscored, planned, 0.0 if seconds is None else seconds[1]),
        seconds=seconds,
        trial=trial,
        trial_on=trial_on,
    )


def _bytes_per_position(cache: Cache) -> float | None:
    """Bytes a position of the newest shards, manifests included; None without any."""
    live = sorted(cache.commits().items())[-COMMITS:]
    commits = [read_commit(cache.storage, commit_path(part, n)) for part, n in live]
    positions = sum(commit.positions for commit in commits)
    return sum(commit.stored_bytes for commit in commits) / positions if positions else None


def _requests(cache: Cache | None, unscored: Work, planned: Work, seconds: float) -> Requests:
    parts = unscored.parts + planned.parts
    there = 0 if cache is None else len(cache.parts())
    pages = JOB_LISTS * max(1, math.ceil((there + planned.parts) / LISTED))
    renewals = math.floor(seconds / RENEW_EVERY_S)
    rollouts = parts + unscored.rollouts_bytes // GET_BYTES
    return Requests(
        writes=JOB_WRITES + PART_WRITES * parts + renewals,
        reads=JOB_READS + (PART_READS - 1) * parts + rollouts + renewals,
        lists=pages,
    )
