"""The rollout job: a student samples what a plan asks for, and each unit of it becomes a part.

A *unit* is a policy, prompts, sampler settings and a seed; its id is a hash of those, and names the
part. A *cycle* is the list of units of one round. Running a plan again adds nothing for units that
have their part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.part import PartMeta, rollout_id
from stillroom.cache.progress import Progress
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.store import Cache
from stillroom.replay.prompts import Prompt
from stillroom.replay.sampler import Sampled, SamplerConfig, StudentSampler


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A planned piece of sampling."""

    policy_version: int
    source: str
    """Who samples: student or teacher."""
    prompt_ids: tuple[int, ...]
    """Prompts, each sampled `samples_per_prompt` times."""
    sampler: dict[str, Any]
    """Settings that decide the distribution."""
    seed: int

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return jsonfile.digest(jsonfile.dump(asdict(self)))[:16]


@dataclass(frozen=True, slots=True)
class Cycle:
    """One round of sampling."""

    units: tuple[Unit, ...]

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return jsonfile.dump({"units": [asdict(unit) for unit in self.units]})

    @staticmethod
    def from_json(data: bytes, where: str) -> "Cycle":
        """Parse a stored cycle.

        Raises:
            CorruptError: it is not one.
        """
        value = jsonfile.load(data, where)
        try:
            units = [{**u, "prompt_ids": tuple(u["prompt_ids"])} for u in value["units"]]
        except (KeyError, TypeError) as error:
            do = "Restore the file."
            raise CorruptError(where, "a plan of units", f"no usable {error}", do) from error
        return Cycle(tuple(jsonfile.build(Unit, u, where) for u in units))


@dataclass(slots=True)
class RolloutReport:
    """What a run of the job did."""

    added: list[str] = field(default_factory=list)
    """Parts that it wrote."""
    rollouts: int = 0
    positions: int = 0
    sample_s: float = 0.0
    """Seconds spent sampling."""


def plan_cycle(
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    *,
    policy_version: int,
    seed: int,
    unit_rollouts: int,
    source: str = "student",
) -> Cycle:
    """Cut prompts into units of at most `unit_rollouts` rollouts (a prompt's samples stay
    together)."""
    if unit_rollouts < 1:
        raise ConfigError("unit_rollouts", "at least 1", f"{unit_rollouts}", "Raise it.")
    size = max(1, unit_rollouts // config.samples_per_prompt)
    groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    units = [
        Unit(
            policy_version=policy_version,
            source=source,
            prompt_ids=tuple(p.id for p in group),
            sampler=config.recorded(),
            seed=seed,
        )
        for group in groups
    ]
    return Cycle(tuple(units))


def store_cycle(cache: Cache, name: str, cycle: Cycle) -> Cycle:
    """Store a cycle's plan under a name; the plan that is there first holds.

    Returns:
        The stored plan.
    """
    path = f"units/{name}.json"
    cache.storage.put_new(path, cycle.to_json())
    return Cycle.from_json(cache.storage.get(path), cache.storage.describe(path))


def rollout(
    cache: Cache,
    cycle: Cycle,
    prompts: Sequence[Prompt],
    make_sampler: Callable[[], StudentSampler],
) -> RolloutReport:
    """Sample every unit of a cycle that has no part.

    Args:
        cache: where the parts go.
        cycle: what to sample.
        prompts: prompts among which the units' are found by id.
        make_sampler: gives the sampler; called only if there is something to sample.

    Raises:
        InputError: a planned prompt is not among the prompts.
    """
    report = RolloutReport()
    by_id = {prompt.id: prompt for prompt in prompts}
    missing = [unit for unit in cycle.units if not cache.has_part(unit.policy_version, unit.id)]
    if not missing:
        return report
    sampler = make_sampler()
    for unit in missing:
        unknown = [i for i in unit.prompt_ids if i not in by_id]
        if unknown:
            do = "Use the prompts that the plan was made from."
            raise InputError(
                f"unit {unit.id}", "its prompts", f"no prompt with id {unknown[0]}", do
            )
        _sample_unit(cache, unit, [by_id[i] for i in unit.prompt_ids], sampler, report)
    return report


def _sample_unit(
    cache: Cache, unit: Unit, prompts: list[Prompt], sampler: StudentSampler, report: RolloutReport
) -> None:
    copies = int(unit.sampler["samples_per_prompt"])
    rows = [(prompt, sample) for prompt in prompts for sample in range(copies)]
    found: dict[int, Sampled] = {}
    start = time.perf_counter()
    with Progress(f"roll out {unit.id}", len(rows), "rollouts") as progress:
        seed = unit.seed * 1_000_003 + int(unit.id[:8], 16)
        for index, sampled in sampler.sample([prompt.token for prompt, _ in rows], seed):
            found[index] = sampled
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


def _record(
    unit: Unit, index: int, prompt: Prompt, sample: int, sampled: Sampled
) -> dict[str, Any]:
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
        "policy_version_min": unit.policy_version,
        "policy_version_max": unit.policy_version,
        "ends_with_stop": sampled.finish_reason == "stop",
    }
