"""The rollout job: a student samples what a plan asks for, and each unit of it becomes a part.

Running a plan again adds nothing for units that have their part. Any number of workers may run the
same plan at once: a unit is claimed by the name of its part, so that hardly any is sampled twice;
where two do sample one, the rollouts that are put first are the part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache.claims import Claims
from stillroom.cache.clock import HOUR_S
from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.part import PartMeta, part_name, rollout_id
from stillroom.cache.progress import Progress
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.shared_work import SharedWork
from stillroom.cache.store import Cache
from stillroom.cache.workers import ALONE, Worker
from stillroom.replay.cycle import Cycle, Unit
from stillroom.replay.prompts import Prompt
from stillroom.replay.sampler import Sampled, StudentSampler

STALLED_AFTER_S = HOUR_S
"""A sampler that finishes no rollout for so long loses its claim: the longest take many steps."""


@dataclass(slots=True)
class RolloutReport:
    """What a run of the job did."""

    added: list[str] = field(default_factory=list)
    """Parts that it wrote."""
    lost: list[str] = field(default_factory=list)
    """Parts that another worker wrote first."""
    rollouts: int = 0
    positions: int = 0
    sample_s: float = 0.0
    """Seconds spent sampling."""


def rollout(
    cache: Cache,
    cycle: Cycle,
    make_sampler: Callable[[], StudentSampler],
    *,
    worker: Worker = ALONE,
) -> RolloutReport:
    """Sample every unit of a cycle that has no part.

    Units that other workers have claimed are left to them until nothing else is left to do. Then
    this one waits, and takes over what they do not finish: in the end every unit has its part.

    Args:
        cache: where the parts go.
        cycle: what to sample.
        make_sampler: gives the sampler; called only if there is something to sample.
        worker: whose share of the units comes first.

    Raises:
        InputError: a unit's prompt is not among the cycle's.
        ConfigError: the sampler notes more extra ids than the cache scores.
    """
    missing = missing_units(cache, cycle)
    if not missing:
        return RolloutReport()
    roller = UnitSampler(cache, cycle, make_sampler())
    names = [part_name(unit.policy_version, unit.id) for unit in missing]
    roller.sample(names, worker)
    return roller.report


def missing_units(cache: Cache, cycle: Cycle) -> list[Unit]:
    """Units of a cycle that have no part; where there are any, they and the storage are fit for it.

    Raises:
        ConfigError: the sampler notes more extra ids than the cache scores.
        StorageError: the storage cannot keep what is promised.
    """
    missing = [unit for unit in cycle.units if not cache.has_part(unit.policy_version, unit.id)]
    if missing:
        _check_extra(cache, missing)
        cache.storage.check_conditional_puts()
    return missing


class UnitSampler:
    """A loaded sampler, and the cycle whose units it samples.

    Args:
        cache: where the parts go.
        cycle: what may be sampled.
        sampler: an engine that runs the units' policy.
    """

    def __init__(self, cache: Cache, cycle: Cycle, sampler: StudentSampler) -> None:
        """Nothing is sampled yet."""
        self.report = RolloutReport()
        self._cache, self._sampler = cache, sampler
        self._units = {part_name(unit.policy_version, unit.id): unit for unit in cycle.units}
        self._prompts = {prompt.id: prompt for prompt in cycle.prompts}

    def sample(self, parts: Sequence[str], worker: Worker = ALONE) -> None:
        """Sample the units that become the parts, or wait until others have done it.

        Raises:
            InputError: a unit's prompt is not among the cycle's.
        """
        self._work(worker).do_all(parts)

    def sample_free(self, parts: Sequence[str]) -> list[str]:
        """Sample the units that nobody else has claimed; returns the parts of those that somebody
        has.

        Raises:
            InputError: a unit's prompt is not among the cycle's.
        """
        return self._work(ALONE).do_free(parts)

    def _work(self, worker: Worker) -> SharedWork:
        return SharedWork(
            job="roll out",
            claims=Claims(self._cache.storage, STALLED_AFTER_S),
            is_left=self._is_missing,
            do=self._sample,
            worker=worker,
            full_look_every=1,  # a claim may be that of the part's scorer
        )

    def _is_missing(self, part: str) -> bool:
        unit = self._units[part]
        return not self._cache.has_part(unit.policy_version, unit.id)

    def _sample(self, part: str, progress: Callable[[], None]) -> None:
        unit = self._units[part]
        unknown = [i for i in unit.prompt_ids if i not in self._prompts]
        if unknown:
            do = "Make the plan with cycle.plan_cycle."
            raise InputError(
                f"unit {unit.id}", "its prompts", f"no prompt with id {unknown[0]}", do
            )
        prompts = [self._prompts[i] for i in unit.prompt_ids]
        _sample_unit(self._cache, unit, prompts, self._sampler, self.report, progress)


def _check_extra(cache: Cache, units: list[Unit]) -> None:
    noted, most = max(unit.sampler.get("extra", 0) for unit in units), cache.identity.student_extra
    if noted > most:
        expected = f"at most {most}, the ids of the student that this cache scores"
        do = "Lower it, or make the cache with --extra M --extra-kind student."
        raise ConfigError("sampler.extra", expected, f"{noted}", do)


def _sample_unit(
    cache: Cache,
    unit: Unit,
    prompts: list[Prompt],
    sampler: StudentSampler,
    report: RolloutReport,
    step: Callable[[], None],
) -> None:
    copies = int(unit.sampler["samples_per_prompt"])
    rows = [(prompt, sample) for prompt in prompts for sample in range(copies)]
    found: dict[int, Sampled] = {}
    start = time.perf_counter()
    with Progress(f"roll out {unit.id}", len(rows), "rollouts") as progress:
        seed = unit.seed * 1_000_003 + int(unit.id[:8], 16)
        for index, sampled in sampler.sample([prompt.token for prompt, _ in rows], seed):
            found[index] = sampled
            step()
            progress.advance()
    report.sample_s += time.perf_counter() - start
    records = [
        _record(unit, i, prompt, sample, found[i]) for i, (prompt, sample) in enumerate(rows)
    ]
    meta = PartMeta(
        policy_version=unit.policy_version,
        unit=unit.id,
        tokenizer_fingerprint=cache.identity.tokenizer_fingerprint,
        vocab_size=cache.identity.vocab_size,
        sampler=unit.sampler,
    )
    if cache.add_part(pa.Table.from_pylist(records, PART_SCHEMA), meta):
        report.added.append(meta.name)
        report.rollouts += len(records)
        report.positions += sum(len(r["completion"]) for r in records)
    else:
        report.lost.append(meta.name)


def _record(
    unit: Unit, index: int, prompt: Prompt, sample: int, sampled: Sampled
) -> dict[str, Any]:
    version = unit.policy_version if unit.source == "student" else -1
    return {
        "rollout_id": rollout_id(unit.id, index),
        "prompt_id": prompt.id,
        "prompt_name": prompt.name,
        "group": rollout_id(unit.id, index - sample),
        "sample_index": sample,
        "prompt": prompt.token,
        "completion": sampled.completion,
        "scored": None,
        "behaviour_logprob": sampled.behaviour_logprob,
        "teacher_prompt": None,
        "finish_reason": sampled.finish_reason,
        "source": unit.source,
        "policy_version_min": version,
        "policy_version_max": version,
        "ends_with_stop": sampled.finish_reason == "stop",
        **_extra(sampled),
    }


def _extra(sampled: Sampled) -> dict[str, Any]:
    """The extra ids of each token, without those that a filter shut out."""
    if sampled.extra_id is None or sampled.extra_behaviour_logprob is None:
        return {"extra_id": None, "extra_behaviour_logprob": None}
    pairs = list(zip(sampled.extra_id, sampled.extra_behaviour_logprob, strict=True))
    return {
        "extra_id": [ids[logprob > -np.inf].tolist() for ids, logprob in pairs],
        "extra_behaviour_logprob": [lp[lp > -np.inf].tolist() for _, lp in pairs],
    }
