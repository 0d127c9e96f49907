"""What a run did, kept beside its checkpoints before its student becomes a policy, so that a run
that is killed right after that ends without training again."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.storage import Storage
from stillroom.replay.policies import Policy, policy_versions, read_policy
from stillroom.train.checkpoint import checkpoints_of, kept_checkpoints
from stillroom.train.config import ReplayConfig
from stillroom.train.durable import write_file
from stillroom.train.run_snapshot import release_snapshot

OUTCOME = "trained.json"


def keep_outcome(output: Path, run: str, policy: Policy, values: Mapping[str, Any]) -> None:
    """Keep what a run did, and the policy that its student is about to become.

    Raises:
        StorageError: it cannot be written.
    """
    kept = {"policy": asdict(policy), "values": dict(values)}
    write_file(_path(output, run), jsonfile.dump_sealed(kept))


def published_outcome(
    storage: Storage, output: Path, run: str
) -> tuple[Policy, dict[str, Any]] | None:
    """The policy that a run published, and what it did; None where the cache has no such policy,
    or another run's in its place.

    Raises:
        CorruptError: what was kept is damaged.
    """
    path = _path(output, run)
    if not path.is_file():
        return None
    kept = jsonfile.load_sealed(path.read_bytes(), str(path))
    policy: Policy = jsonfile.build(Policy, kept["policy"], str(path))
    there = policy.version in policy_versions(storage)
    if not there or read_policy(storage, policy.version) != policy:
        return None
    return policy, kept["values"]


def unfinished_policy(storage: Storage, output: Path, run_name: str) -> int | None:
    """The newest policy that a run of this name has checkpoints of training from, or published a
    student of, without the record `<run name>-<policy>.json` of its end; None without such a run.
    """
    found = [
        int(match[1])
        for folder in checkpoints_of(output, "").glob(f"{run_name}-*")
        if (match := re.fullmatch(rf"{re.escape(run_name)}-(\d{{6,9}})", folder.name))
        and not (output / f"{folder.name}.json").exists()
        and (kept_checkpoints(folder) or published_outcome(storage, output, folder.name))
    ]
    return max(found, default=None)


def release_run(storage: Storage, output: Path, run: str, config: ReplayConfig) -> None:
    """Let go of what a run replayed that is through, its phases' caches too."""
    release_snapshot(storage, output, run)
    for index, phase in enumerate(config.phases):
        if phase.root is not None:
            release_snapshot(Storage(phase.root), output, f"{run}-phase{index}")


def _path(output: Path, run: str) -> Path:
    return checkpoints_of(output, run) / OUTCOME
