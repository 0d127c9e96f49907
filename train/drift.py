"""Drift: how far the student has moved from the policies that sampled what it trains on, and how
much of what it says now the cache knows nothing of. Measured from what every step has anyway.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage
from stillroom.train.callbacks import Callback, MicroOutcome, StepOutcome
from stillroom.train.drift_sums import Sums, can_be
from stillroom.train.ranks import from_every_rank, rank
from stillroom.train.run_snapshot import pin_name

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer

VERSION = re.compile(r"-1|0|[1-9][0-9]{0,9}")
MAX_VERSION = 2**31 - 1
WHERE, DO = "drift in a checkpoint", "Delete the checkpoint to resume from an older one."


@dataclass(slots=True)
class DriftMeter:
    """Drift by policy version, since the last record."""

    by_policy: dict[int, Sums] = field(default_factory=dict)

    def add(self, outcome: MicroOutcome) -> None:
        """Add a micro-batch, scored positions (P,); where the behaviour logprob is unknown they
        count for coverage alone."""
        versions = outcome.policy_version
        for version in np.unique(versions):
            sums = self.by_policy.setdefault(int(version), Sums())
            sums.add(outcome, versions == version)

    def merge(self, by_rank: Sequence[Mapping[int, Sums]]) -> None:
        """Replace the sums by those of all ranks together."""
        total: dict[int, Sums] = {}
        for version, sums in (item for part in by_rank for item in part.items()):
            have = total.get(version, Sums())
            pairs = ((getattr(have, f.name), getattr(sums, f.name)) for f in fields(Sums))
            total[version] = Sums(*(mine + theirs for mine, theirs in pairs))
        self.by_policy = total

    def state(self) -> dict[str, dict[str, float]]:
        """Plain values, for a checkpoint."""
        return {str(version): asdict(sums) for version, sums in self.by_policy.items()}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave.

        Raises:
            CorruptError: these are not sums by policy version.
        """
        self.by_policy = {_version(name): _sums(name, sums) for name, sums in state.items()}

    def take(self, policy_version: int) -> dict[str, Any]:
        """Summary by policy version; starts anew.

        Args:
            policy_version: the policy that is being trained from, -1 if it is none of the cache's.
                Lag is counted from it; None where either version is unknown.
        """
        unknown = policy_version < 0
        out = {
            str(version): {
                **sums.summary(),
                "lag": None if unknown or version < 0 else policy_version - version,
            }
            for version, sums in sorted(self.by_policy.items())
        }
        self.by_policy = {}
        return out


class DriftCallback(Callback):
    """Measures drift of every step; every `drift_every_steps` and at the end it is put into the
    cache's `drift/`, told to the trackers, and kept for the report.

    The records of a run are in a folder of its own: an id is drawn for it when it begins, and a
    checkpoint keeps that.

    Rows of other caches and of datasets, which no policy of this cache sampled, are not measured.
    Every rank adds up its own positions. With a checkpoint rank 0 takes over the sums of all, so
    that a resumed run goes on with what an unbroken one has.
    """

    name = "drift"

    def __init__(self) -> None:
        """Start at nothing."""
        self._meter = DriftMeter()
        self._last: dict[str, Any] = {}
        self._id = uuid.uuid4().hex[:16]

    def on_step(self, trainer: "ReplayTrainer", outcome: StepOutcome) -> None:
        """Add the step; record what is due."""
        for micro in outcome.micro if outcome.replayed else ():
            self._meter.add(micro)
        if outcome.step % trainer.config.drift_every_steps == 0:
            self._record(trainer, outcome.step)

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Record what is left."""
        if trainer.step % trainer.config.drift_every_steps:
            self._record(trainer, trainer.step)
        report.drift = self._last

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks, which all of them must ask for; from then on rank 0's."""
        self._gather()
        return {"id": self._id, "sums": self._meter.state(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them, on rank 0.

        Raises:
            CorruptError: they are not sums by policy version.
        """
        sums, last, own_id = (state.get(name) for name in ("sums", "last", "id"))
        if not (
            state.keys() == {"id", "sums", "last"}
            and _is_plain(sums)
            and _is_plain(last)
            and isinstance(own_id, str)
        ):
            raise CorruptError(WHERE, "sums, the last record and an id", f"{state!r:.80}", DO)
        self._meter.restore(sums if rank() == 0 else {})
        self._last, self._id = last, own_id

    def _gather(self) -> None:
        gathered = from_every_rank(self._meter.by_policy)
        self._meter.merge(gathered if rank() == 0 else [])

    def _record(self, trainer: "ReplayTrainer", step: int) -> None:
        self._gather()
        taken = self._meter.take(trainer.policy_version)
        if trainer.is_main:
            self._last = taken
            run = f"{pin_name(trainer.output, trainer.run)}-{self._id}"
            put_drift(trainer.cache.storage, run, step, taken)
            trainer.log(_figures(taken))


def _figures(by_policy: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What trackers get: `drift/<measure>/v<policy>`."""
    return {
        f"drift/{name}/v{version}": float(value)
        for version, measures in by_policy.items()
        for name, value in measures.items()
        if value is not None
    }


def _is_plain(value: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values())


def _version(name: str) -> int:
    if VERSION.fullmatch(name) is None or int(name) > MAX_VERSION:
        raise CorruptError(WHERE, "a policy version", f"{name!r:.80}", DO)
    return int(name)


def _sums(name: str, value: Mapping[str, Any]) -> Sums:
    where = f"{WHERE}, policy {name}"
    sums: Sums = jsonfile.build(Sums, dict(value), where)
    if not can_be(sums):
        raise CorruptError(where, "sums over some tokens", f"{sums}", DO)
    return sums


def put_drift(storage: Storage, run: str, step: int, drift: dict[str, Any]) -> None:
    """Leave a record in the cache. One that is there for this run and step stays: it is from before
    the run was resumed, perhaps on other processes, whose sums differ in the last digits.

    Args:
        storage: the cache's.
        run: name of the run's folder: that of its pin, and the id that was drawn for it.
        step: optimiser steps that it had taken.
        drift: by policy version.
    """
    path = f"drift/{run}/{step:08d}.json"
    data = jsonfile.dump_sealed({"run": run, "step": step, "by_policy": drift})
    storage.put_new(path, data)
