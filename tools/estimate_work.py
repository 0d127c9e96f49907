"""What a scoring job has before it: parts that are not scored, and what is planned to be sampled;
rollouts, tokens and positions of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from stillroom.cache.errors import MissingError
from stillroom.cache.fill_rollouts import fill_rollouts, name_rollouts
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.identity import Identity
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.store import Cache, part_path
from stillroom.replay.cycle import has_cycle, load_cycle
from stillroom.replay.policies import (
    check_student,
    newest_kept,
    open_policy,
    policy_versions,
)
from stillroom.replay.prompts import load_prompts
from stillroom.replay.refresh import cycle_name
from stillroom.tools.jobs import RolloutJob

PROMPTS_UNIT = "0" * 16
"""Stands for the unit of rollouts that are none."""


@dataclass(slots=True)
class Work:
    """What is to be scored."""

    parts: int = 0
    rollouts: int = 0
    positions: int = 0
    """Scored tokens."""
    tokens: int = 0
    """That the teacher reads: prompts and completions."""
    longest_tokens: int = 0
    """Of the rollouts that were read."""
    rollouts_bytes: int = 0
    counted_parts: int = 0
    """Parts that were read whole; figures of the others go by their bytes."""

    def add(self, other: "Work") -> None:
        """Count more."""
        for name in ("parts", "rollouts", "positions", "tokens", "rollouts_bytes", "counted_parts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_tokens = max(self.longest_tokens, other.longest_tokens)


@dataclass(slots=True)
class Counted:
    """Work, and rows of it to try the teacher on."""

    work: Work = field(default_factory=Work)
    tables: list[pa.Table] = field(default_factory=list)
    """Rollouts of parts that were read."""


def count_unscored(
    cache: Cache, most_parts: int, most_tables: int, again: str | None = None
) -> Counted:
    """Count the parts that are to be scored.

    Args:
        cache: the cache; only read.
        most_parts: parts to read whole, spread over all; the others' figures go by their bytes.
        most_tables: of those, how many to keep for a trial.
        again: a part that is scored, and will be once more.

    Raises:
        MissingError: that one is not scored.
    """
    unscored = cache.unscored()
    if again is not None:
        cache.commit_of(again)
        unscored = sorted({*unscored, again} - cache.retired())
    sizes = {e.path: e.size_bytes for e in cache.storage.list("rollouts")}
    size_of = {part: sizes.get(part_path(part), 0) for part in unscored}
    chosen = _spread(unscored, most_parts)
    counted, read = Counted(), Work()
    for part in chosen:
        table, _, _ = cache.read_part(part)
        work = count_table(table, cache.identity)
        work.rollouts_bytes = size_of[part]
        read.add(work)
        if len(counted.tables) < most_tables:
            counted.tables.append(table)
    share = sum(size_of.values()) / max(read.rollouts_bytes, 1) if chosen else 0.0
    counted.work = Work(
        parts=len(unscored),
        rollouts=round(read.rollouts * share),
        positions=round(read.positions * share),
        tokens=round(read.tokens * share),
        longest_tokens=read.longest_tokens,
        rollouts_bytes=sum(size_of.values()),
        counted_parts=len(chosen),
    )
    return counted


def count_table(table: pa.Table, identity: Identity) -> Work:
    """Count one part's rollouts."""
    arrays = part_arrays(table, identity.student_extra)
    lengths = np.diff(arrays["sequence_start"].astype(np.int64))
    own = np.diff(arrays["teacher_prompt_start"].astype(np.int64))
    read = np.where(own > 0, lengths - arrays["prompt_length"] + own, lengths)
    return Work(
        parts=1,
        rollouts=len(lengths),
        positions=int(arrays["position_start"][-1]),
        tokens=int(read.sum()),
        longest_tokens=int(read.max()),
        counted_parts=1,
    )


def count_planned(
    cache: Cache | None, identity: Identity, job: RolloutJob, teacher: ModelFiles
) -> tuple[Work, list[np.ndarray]]:
    """Count what a rollout job will still sample, with completions as long as they may be. A stored
    plan has its own number of samples and their length.

    Args:
        cache: the cache, if there is one yet.
        identity: its identity, or the one that it will have.
        job: the rollout job.
        teacher: whose tokenizer renders the prompts where no student is known yet.

    Returns:
        The work, at most; and the prompts' token ids.

    Raises:
        MismatchError: the job's student does not have the cache's tokens.
        MissingError: ids are mapped, and no student is known.
    """
    total, prompts = Work(), []
    for unit in _planned_units(cache, identity, job, teacher):
        lengths = [len(prompt) for prompt in unit.prompts]
        rollouts = len(lengths) * unit.samples
        total.add(
            Work(
                parts=1,
                rollouts=rollouts,
                positions=rollouts * unit.longest,
                tokens=sum(lengths) * unit.samples + rollouts * unit.longest,
                longest_tokens=max(lengths) + unit.longest,
            )
        )
        prompts += unit.prompts
    return total, prompts


def as_rollouts(prompts: Sequence[np.ndarray]) -> pa.Table:
    """Prompts as rollouts whose completion is all but the first token: something to try a teacher
    on before anything is sampled."""
    rows = [{"prompt": p[:1].tolist(), "completion": p[1:].tolist()} for p in prompts if len(p) > 1]
    kept = pa.schema([PART_SCHEMA.field(name) for name in ("prompt", "completion")])
    return name_rollouts(fill_rollouts(pa.Table.from_pylist(rows, kept), None), PROMPTS_UNIT)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A unit without a part."""

    prompts: list[np.ndarray]
    samples: int
    """Of each prompt."""
    longest: int
    """Tokens of a completion, at most."""


def _planned_units(
    cache: Cache | None, identity: Identity, job: RolloutJob, teacher: ModelFiles
) -> Iterator[_Planned]:
    """Units without a part: of the stored plan if there is one."""
    version = _version(cache, job)
    name = cycle_name(version)
    if cache is not None and has_cycle(cache, name):
        cycle = load_cycle(cache, name)
        by_id = {prompt.id: prompt.token for prompt in cycle.prompts}
        for unit in cycle.units:
            if not cache.has_part(unit.policy_version, unit.id):
                samples, longest = (
                    int(unit.sampler[key]) for key in ("samples_per_prompt", "max_new_tokens")
                )
                yield _Planned([by_id[i] for i in unit.prompt_ids], samples, longest)
        return
    from transformers import AutoTokenizer

    files = _student(cache, identity, job, version) or teacher
    samples, longest = job.sampler.samples_per_prompt, job.sampler.max_new_tokens
    room = min(files.max_length, identity.max_length) - longest
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    prompts = load_prompts(job.prompts, tokenizer, room).prompts[: job.refresh.prompts_per_cycle]
    size = max(1, job.refresh.unit_rollouts // samples)
    for start in range(0, len(prompts), size):
        yield _Planned([p.token for p in prompts[start : start + size]], samples, longest)


def _student(
    cache: Cache | None, identity: Identity, job: RolloutJob, version: int
) -> ModelFiles | None:
    """Who will sample; None where nobody is named yet."""
    named = None if job.student is None else inspect_model(job.student)
    if named is not None:
        fingerprint, vocab_size = identity.tokenizer_fingerprint, identity.vocab_size
        check_student(named, fingerprint, vocab_size, identity.teacher.name)
    if cache is not None and policy_versions(cache.storage):
        return open_policy(cache.storage, version, named)
    if named is None and identity.id_map:
        do = "Name the student in the rollout job: the teacher's ids are others."
        raise MissingError("estimate --rollout", "a student", "none, and a map of ids", do)
    return named


def _version(cache: Cache | None, job: RolloutJob) -> int:
    if job.policy is not None:
        return job.policy
    newest = None if cache is None else newest_kept(cache.storage)
    return newest or 0


def _spread(parts: list[str], most: int) -> list[str]:
    """At most so many of them, evenly spaced."""
    if len(parts) <= most:
        return parts
    return [parts[i] for i in np.linspace(0, len(parts) - 1, most).astype(int)]
