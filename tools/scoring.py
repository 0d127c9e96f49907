"""What `stillroom score` does: once or as a service, here or on Ray, alone or as one of many."""

import os
from contextlib import suppress
from dataclasses import replace
from functools import partial

from stillroom.cache.errors import ConfigError, InputError, MissingError
from stillroom.cache.load_teacher import load_teacher
from stillroom.cache.score import Scorer, ScoreReport
from stillroom.cache.score_on_ray import score_on_ray
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, Teacher, TeacherConfig
from stillroom.cache.watch import watch
from stillroom.cache.workers import ALONE, Worker, find_worker
from stillroom.tools.ending import ends_when_told
from stillroom.tools.jobs import ScoreJob
from stillroom.tools.render import say
from stillroom.tools.score_settings import teacher_of
from stillroom.tools.score_text import print_scored


def score_all(job: ScoreJob) -> int:
    """`stillroom score`."""
    worker = ALONE if job.engine == "ray" else find_worker(job.rank, job.world_size, os.environ)
    if job.again is not None and worker.world_size > 1:
        got, do = f"{worker.world_size} workers", "Let one worker do it, then start the others."
        raise ConfigError("again", "one worker", got, do)
    _check_again(job)
    cache = Cache.open(job.root)
    if job.again is not None and not cache.is_scored(job.again):
        do = "Score it with 'stillroom score'."
        raise MissingError(f"part {job.again}", "a commit", "none", do)
    teacher_of(job, cache)
    if not (job.watch or job.again or cache.unscored()):
        say(f"score: nothing to do, {len(cache.commits())} parts are scored")
        return 0
    with ends_when_told():
        if job.engine == "ray":
            report = _on_ray(job, cache)
        elif job.watch:
            report = _until_told(job, cache, worker)
        else:
            scorer = _scorer(job, cache, worker)
            if job.again is not None:
                _set_aside(job.again, scorer)
            scorer.score(cache.unscored())
            report = scorer.report
    print_scored(report)
    return 1 if report.too_long else 0


def _check_again(job: ScoreJob) -> None:
    if job.again is None:
        return
    if job.watch:
        do = "Score the part again first, and watch then."
        raise ConfigError("again", "no --watch with it", "both", do)
    if job.engine == "ray":
        do = "Score the part again with the engine local."
        raise ConfigError("again", "the engine local", "ray", do)


def _set_aside(part: str, scorer: Scorer) -> None:
    """Take a part's scores out of use, once nothing is known that would keep it from new ones."""
    scorer.prepare()
    if part not in scorer.fitting(sorted({*scorer.cache.unscored(), part})):
        do = "Give the engine a longer context, or leave its scores as they are."
        raise InputError(part, "rows that the teacher reads whole", "longer ones", do)
    scorer.cache.quarantine(part, "scored again by request", damaged=False)


def _until_told(job: ScoreJob, cache: Cache, worker: Worker) -> ScoreReport:
    """A service ends well when it is told to end."""
    report = ScoreReport()
    with suppress(KeyboardInterrupt):
        scorer = _scorer(job, cache, worker)
        report = scorer.report
        watch(scorer, job.watch_s)
    return report


def _scorer(job: ScoreJob, cache: Cache, worker: Worker) -> Scorer:
    teacher = load_checked(job, cache)
    accept, too_long = job.accept_numerics, job.too_long
    return Scorer(cache, teacher, accept_numerics=accept, worker=worker, too_long=too_long)


def load_checked(job: ScoreJob, cache: Cache) -> Teacher:
    """Load the teacher of a job, once it is known to be the cache's.

    Raises:
        StillroomError: as `teacher_of` and `load_teacher`.
    """
    files, id_map = teacher_of(job, cache)
    return load_teacher(files, job.teacher, id_map, ScoreSpec.of(cache.identity))


def _on_ray(job: ScoreJob, cache: Cache) -> ScoreReport:
    teacher = job.teacher
    return score_on_ray(
        cache,
        partial(load_checked, replace(job, teacher=_absolute(teacher))),
        job.ray,
        accept_numerics=job.accept_numerics,
        wants_gpu=teacher.backend != "server" and teacher.device != "cpu",
        too_long=job.too_long,
    )


def _absolute(teacher: TeacherConfig) -> TeacherConfig:
    """The same teacher for processes that run in another folder."""
    members = (replace(one, model=_absolute_path(one.model)) for one in teacher.ensemble)
    return replace(teacher, model=_absolute_path(teacher.model), ensemble=tuple(members))


def _absolute_path(model: str) -> str:
    folder = local_path(model)
    return str(folder.absolute()) if folder.is_dir() else model
