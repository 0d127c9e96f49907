"""The rollout job on Ray: each process of a pool loads the student once, and samples units with the
same claims as any other worker."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from stillroom.cache.part import part_name
from stillroom.cache.progress import Progress
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.ray_pool import Do, Outcome, address_of, run_on_ray
from stillroom.cache.store import Cache
from stillroom.replay.cycle import load_cycle
from stillroom.replay.rollout import RolloutReport, UnitSampler, missing_units
from stillroom.replay.sampler import StudentSampler

FIGURES = tuple(f.name for f in fields(RolloutReport) if f.type in (int, float))
"""Of a report, that add up."""


def rollout_on_ray(
    cache: Cache,
    cycle_name: str,
    load: Callable[[], StudentSampler],
    config: RayConfig,
    *,
    wants_gpu: bool = False,
) -> RolloutReport:
    """Sample every unit of a stored cycle that has no part.

    Args:
        cache: where the parts go; Ray's processes must see it at the same root.
        cycle_name: what to sample.
        load: loads the sampler; it must pickle, and is called in each process.
        config: how many processes, where.
        wants_gpu: whether the sampler would use a GPU that it was given.

    Returns:
        What all processes did. A part whose process died between its put and its answer is among
        those that were lost to another worker.

    Raises:
        StillroomError: as `run_on_ray` and `rollout`.
    """
    units, report = missing_units(cache, load_cycle(cache, cycle_name)), RolloutReport()
    if not units:
        return report
    parts = [part_name(unit.policy_version, unit.id) for unit in units]
    make = partial(_make_sampler, address_of(cache), cycle_name, load)
    with Progress("roll out on Ray", len(parts), "parts") as progress:
        for outcome in run_on_ray(parts, make, config, wants_gpu=wants_gpu):
            progress.advance()
            (report.added if outcome["added"] else report.lost).append(str(outcome["part"]))
            for name in FIGURES:
                setattr(report, name, getattr(report, name) + outcome[name])
    return report


def _make_sampler(root: str, cycle_name: str, load: Callable[[], StudentSampler]) -> Do:
    cache = Cache.open(root)
    return partial(_sample_one, UnitSampler(cache, load_cycle(cache, cycle_name), load()))


def _sample_one(sampler: UnitSampler, part: str, waits: bool) -> Outcome | None:
    added, before = len(sampler.report.added), _figures(sampler.report)
    if waits:
        sampler.sample([part])
    elif sampler.sample_free([part]):
        return None
    more = {name: value - before[name] for name, value in _figures(sampler.report).items()}
    return {"part": part, "added": len(sampler.report.added) > added, **more}


def _figures(report: RolloutReport) -> dict[str, float]:
    return {name: getattr(report, name) for name in FIGURES}
