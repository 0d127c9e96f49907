"""From a score job's settings to its teacher's files, and to the identity that they ask for."""

from dataclasses import fields, replace
from typing import Any

from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.id_map import IdMap
from stillroom.cache.identity import Identity
from stillroom.cache.load_teacher import inspect_teacher
from stillroom.cache.store import IDENTITY_PATH, Cache
from stillroom.cache.teacher import ScoreSpec, identity_of
from stillroom.tools.jobs import InitJob, ScoreJob


def teacher_of(job: ScoreJob, cache: Cache) -> tuple[ModelFiles, IdMap | None]:
    """The teacher's files and the map to its ids, once both are known to be the cache's.

    Raises:
        MismatchError: the teacher or a setting is not the cache's; names every field that differs.
        MissingError, InputError: the teacher's files are not there, or cannot be used.
    """
    known = cache.identity
    files, id_map = inspect_teacher(job.teacher), cache.id_map()
    spec = replace(ScoreSpec.of(known), **_given(job))
    identity = identity_of(files, job.teacher, spec, known.shard_format, id_map)
    known.check_same(identity, cache.storage.describe(IDENTITY_PATH))
    return files, id_map


def new_identity(job: ScoreJob, files: ModelFiles) -> Identity:
    """The identity of the cache that `init` would make with these settings.

    Raises:
        ConfigError: a figure is out of range.
    """
    defaults: dict[str, Any] = {f.name: f.default for f in fields(InitJob) if f.name in _names()}
    return identity_of(files, job.teacher, ScoreSpec(**defaults | _given(job)))


def _given(job: ScoreJob) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in _names()}
    return {name: value for name, value in values.items() if value is not None}


def _names() -> list[str]:
    return [f.name for f in fields(ScoreSpec)]
