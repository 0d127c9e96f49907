"""The score job on Ray: each process of a pool loads the teacher once, and scores parts with the
same claims and commits as any other scorer."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from stillroom.cache.progress import Progress
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.ray_pool import Do, Outcome, address_of, run_on_ray
from stillroom.cache.score import Scorer, ScoreReport
from stillroom.cache.store import Cache
from stillroom.cache.teacher import Teacher

FIGURES = tuple(f.name for f in fields(ScoreReport) if f.type in (int, float))
"""Of a report, that add up."""


def score_on_ray(
    cache: Cache,
    load: Callable[[Cache], Teacher],
    config: RayConfig,
    *,
    accept_numerics: bool = False,
    wants_gpu: bool = False,
) -> ScoreReport:
    """Score every part that has no shard.

    Args:
        cache: where the parts lie; Ray's processes must see it at the same root.
        load: loads the teacher; it must pickle, and is called in each process.
        config: how many processes, where.
        accept_numerics: allow a numeric class that the cache has not seen.
        wants_gpu: whether the teacher would use a GPU that it was given.

    Returns:
        What all processes did. A part whose process died between its commit and its answer is among
        those that were lost to another scorer.

    Raises:
        StillroomError: as `run_on_ray` and `Scorer.score`.
    """
    parts, report = cache.unscored(), ScoreReport()
    if not parts:
        return report
    make = partial(_make_scorer, address_of(cache), load, accept_numerics)
    with Progress("score on Ray", len(parts), "parts") as progress:
        for outcome in run_on_ray(parts, make, config, wants_gpu=wants_gpu):
            progress.advance()
            (report.scored if outcome["committed"] else report.lost).append(str(outcome["part"]))
            for name in FIGURES:
                setattr(report, name, getattr(report, name) + outcome[name])
    return report


def _make_scorer(root: str, load: Callable[[Cache], Teacher], accept_numerics: bool) -> Do:
    cache = Cache.open(root)
    scorer = Scorer(cache, load(cache), accept_numerics=accept_numerics)
    return partial(_score_one, scorer)


def _score_one(scorer: Scorer, part: str) -> Outcome:
    committed, before = len(scorer.report.scored), _figures(scorer.report)
    scorer.score([part])
    more = {name: value - before[name] for name, value in _figures(scorer.report).items()}
    return {"part": part, "committed": len(scorer.report.scored) > committed, **more}


def _figures(report: ScoreReport) -> dict[str, float]:
    return {name: getattr(report, name) for name in FIGURES}
