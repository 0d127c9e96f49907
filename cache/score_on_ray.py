"""The score job on Ray: each process of a pool loads the teacher once, and scores parts with the
same claims and commits as any other scorer."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial

from stillroom.cache.errors import StillroomError
from stillroom.cache.progress import Progress
from stillroom.cache.ray_config import RayConfig
from stillroom.cache.ray_pool import Do, Outcome, address_of, run_on_ray
from stillroom.cache.score import PART_ERRORS, Scorer, ScoreReport, raise_first
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
    too_long: str = "refuse",
) -> ScoreReport:
    """Score every part that has no shard.

    Args:
        cache: where the parts lie; Ray's processes must see it at the same root.
        load: loads the teacher; it must pickle, and is called in each process.
        config: how many processes, where.
        accept_numerics: allow a numeric class that the cache has not seen.
        wants_gpu: whether the teacher would use a GPU that it was given.
        too_long: as in `Scorer`.

    Returns:
        What all processes did. A part whose process died between its commit and its answer is among
        those that were lost to another scorer.

    Raises:
        StillroomError: as `run_on_ray` and `Scorer.score`.
    """
    parts, report = cache.unscored(), ScoreReport()
    if not parts:
        return report
    make = partial(_make_scorer, address_of(cache), load, accept_numerics, too_long, parts)
    failed: dict[str, StillroomError] = {}
    with Progress("score on Ray", len(parts), "parts") as progress:
        for outcome in run_on_ray(parts, make, config, wants_gpu=wants_gpu):
            progress.advance()
            if outcome["error"] is not None:
                failed[str(outcome["part"])] = outcome["error"]
                continue
            if outcome["too_long"]:
                report.too_long.append(str(outcome["part"]))
                continue
            (report.scored if outcome["committed"] else report.lost).append(str(outcome["part"]))
            for name in FIGURES:
                setattr(report, name, getattr(report, name) + outcome[name])
    raise_first(failed)
    return report


def _make_scorer(
    root: str,
    load: Callable[[Cache], Teacher],
    accept_numerics: bool,
    too_long: str,
    parts: Sequence[str],
) -> Do:
    cache = Cache.open(root)
    scorer = Scorer(cache, load(cache), accept_numerics=accept_numerics, too_long=too_long)
    if too_long == "refuse":
        scorer.fitting(sorted({*parts}.intersection(cache.unscored())))
    return partial(_score_one, scorer)


def _score_one(scorer: Scorer, part: str, waits: bool) -> Outcome | None:
    committed, before = len(scorer.report.scored), _figures(scorer.report)
    if waits:
        with suppress(*PART_ERRORS):  # they are told below
            scorer.score([part])
    elif scorer.score_free([part]):
        return None
    more = {name: value - before[name] for name, value in _figures(scorer.report).items()}
    committed_now, error = len(scorer.report.scored) > committed, scorer.failed.get(part)
    is_too_long = part in scorer.report.too_long
    told = {"committed": committed_now, "error": error, "too_long": is_too_long}
    return {"part": part, **told, **more}


def _figures(report: ScoreReport) -> dict[str, float]:
    return {name: getattr(report, name) for name in FIGURES}
