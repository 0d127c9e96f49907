"""One rollout: its text, where it comes from, and what the teacher said at each position."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import FINISH_REASONS, SOURCES, UNUSED_ID, Arrays
from stillroom.cache.store import Cache
from stillroom.tools.texts import Texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """One token that the teacher thought likely, or the sampled one."""

    rank: int | None
    """1 is the teacher's likeliest; None is outside the kept entries."""
    token_id: int
    text: str | None
    logprob: float
    """The teacher's, nats."""
    probability: float
    sampled: bool
    """Whether it is the token that the rollout holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """A further id that the teacher scored: the student's, or a draw from the teacher's tail."""

    token_id: int
    text: str | None
    logprob: float
    """The teacher's, nats."""
    behaviour_logprob: float | None
    """Where it was chosen: the student's, or of the draw within the tail; None if not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """One scored token. What the teacher said is None where the part is not scored yet."""

    position: int
    """Counted along the rollout's scored tokens, from 0."""
    index: int
    """Index of the token in the completion, from 0."""
    token_id: int
    text: str | None
    logprob: float | None
    """The teacher's, nats, given every token before it."""
    probability: float | None
    behaviour_logprob: float | None
    """The sampling policy's, nats; None if it is not known."""
    rank: int | None
    """Among the kept entries, 1 is the likeliest; None is outside."""
    tail_mass: float | None
    """The teacher's probability outside the kept entries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A rollout."""

    part: str
    row: int
    rows: int
    """Rollouts in the part."""
    scored: bool
    meta: dict[str, Any]
    """Policy, finish reason, source, prompt, sampler, and who scored it."""
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    """What the teacher read in the prompt's place; empty if that is the prompt."""
    completion_ids: list[int]
    prompt: str | None
    """Text for display; None without a tokenizer."""
    teacher_prompt: str | None
    completion: str | None
    positions: list[Position]
    alternatives: list[Alternative] | None
    """At the position that was asked for: the teacher's likeliest tokens and the sampled one."""
    extra: list[Extra] | None
    """At the position that was asked for: the extra ids; None where the cache scores none."""
    notes: list[str]


def choose_part(cache: Cache, name: str | None) -> str:
    """A part by its name or the beginning of it; None is the last that is scored and in use.

    Raises:
        MissingError: there is none, or more than one.
    """
    live = cache.commits()
    parts = sorted({*cache.parts(), *live})
    if name is None:
        if not parts:
            do = "Run 'stillroom rollout' first."
            raise MissingError(cache.storage.root, "a part to show", "an empty cache", do)
        return max(live.keys() - cache.retired() or live or parts)
    matching = [part for part in parts if part.startswith(name)]
    if len(matching) != 1 and name not in matching:
        got = f"{len(matching)} that begin so"
        do = "List the parts with 'stillroom ls'."
        raise MissingError(f"part {name!r}", "a part of this cache", got, do)
    return name if name in matching else matching[0]


def show(
    cache: Cache, part: str, row: int, texts: Texts, *, position: int | None, top: int
) -> Shown:
    """Read one rollout.

    Args:
        cache: the cache.
        part: a part's name.
        row: which rollout of it, from 0.
        texts: for the text beside the ids.
        position: show this position only, with the teacher's alternatives; None shows all.
        top: alternatives to show.

    Raises:
        MissingError: there is no such row or position.
        CorruptError: stored bytes are damaged.
    """
    scored = part in cache.commits()
    arrays, rows, meta = _read_scored(cache, part, row) if scored else _read_part(cache, part, row)
    prompt_length = int(arrays["prompt_length"][0])
    token = arrays["token"].tolist()
    teacher_prompt = arrays["teacher_prompt"].tolist()
    positions = _positions(arrays, prompt_length, texts, scored=scored)
    alternatives = extra = None
    if position is not None:
        _in_range("position", position, len(positions), f"{part}, row {row}")
        positions = [positions[position]]
        if scored:
            alternatives = _alternatives(arrays, position, positions[0], top, texts)
            extra = _extra(arrays, position, texts) if "extra_id" in arrays else None
    return Shown(
        part=part,
        row=row,
        rows=rows,
        scored=scored,
        meta=meta,
        prompt_ids=token[:prompt_length],
        teacher_prompt_ids=teacher_prompt,
        completion_ids=token[prompt_length:],
        prompt=texts.text(token[:prompt_length]),
        teacher_prompt=texts.text(teacher_prompt) if teacher_prompt else None,
        completion=texts.text(token[prompt_length:]),
        positions=positions,
        alternatives=alternatives,
        extra=extra,
        notes=texts.notes,
    )


def _read_scored(cache: Cache, part: str, row: int) -> tuple[Arrays, int, dict[str, Any]]:
    commit = read_commit(cache.storage, commit_path(part, cache.commits()[part]))
    _in_range("row", row, commit.rows, part)
    shard = cache.shard(commit)
    arrays = shard.rows(row, row + 1)
    attributes = shard.manifest.attributes
    meta = {"sampler": attributes["sampler"], "scorer": commit.scorer, **_meta(arrays)}
    return arrays, commit.rows, meta


def _read_part(cache: Cache, part: str, row: int) -> tuple[Arrays, int, dict[str, Any]]:
    table, meta, _ = cache.read_part(part)
    _in_range("row", row, table.num_rows, part)
    arrays = part_arrays(table.slice(row, 1))
    return arrays, table.num_rows, {"sampler": meta.sampler, "scorer": None, **_meta(arrays)}


def _meta(arrays: Arrays) -> dict[str, Any]:
    names = ("policy_version_min", "policy_version_max", "prompt_id", "group", "sample_index")
    return {
        **{name: int(arrays[name][0]) for name in (*names, "rollout_id")},
        "finish_reason": FINISH_REASONS[int(arrays["finish_reason"][0])],
        "source": SOURCES[int(arrays["source"][0])],
        "ends_with_stop": bool(arrays["ends_with_stop"][0]),
    }


def _positions(arrays: Arrays, prompt_length: int, texts: Texts, *, scored: bool) -> list[Position]:
    made = []
    for t, index in enumerate(np.flatnonzero(arrays["scored"]).tolist()):
        token_id = int(arrays["token"][index])
        behaviour = float(arrays["behaviour_logprob"][t])
        logprob = float(arrays["sampled_logprob"][t]) if scored else None
        made.append(
            Position(
                position=t,
                index=index - prompt_length,
                token_id=token_id,
                text=texts.token(token_id),
                logprob=logprob,
                probability=None if logprob is None else float(np.exp(logprob)),
                behaviour_logprob=None if np.isnan(behaviour) else behaviour,
                rank=_rank(arrays, t, token_id) if scored else None,
                tail_mass=float(np.exp(np.float64(arrays["tail_logprob"][t]))) if scored else None,
            )
        )
    return made


def _rank(arrays: Arrays, t: int, token_id: int) -> int | None:
    found = np.flatnonzero(arrays["topk_id"][t, : int(arrays["topk_count"][t])] == token_id)
    return int(found[0]) + 1 if len(found) else None


def _alternatives(
    arrays: Arrays, t: int, at: Position, top: int, texts: Texts
) -> list[Alternative]:
    count = min(top, int(arrays["topk_count"][t]))
    entries: list[tuple[int | None, int, float]] = [
        (k + 1, int(arrays["topk_id"][t, k]), float(arrays["topk_logprob"][t, k]))
        for k in range(count)
    ]
    if at.token_id not in [token_id for _, token_id, _ in entries]:
        entries.append((at.rank, at.token_id, float(arrays["sampled_logprob"][t])))
    return [
        Alternative(
            rank=rank,
            token_id=token_id,
            text=texts.token(token_id),
            logprob=logprob,
            probability=float(np.exp(logprob)),
            sampled=token_id == at.token_id,
        )
        for rank, token_id, logprob in entries
    ]


def _extra(arrays: Arrays, t: int, texts: Texts) -> list[Extra]:
    names = ("extra_id", "extra_logprob", "extra_behaviour_logprob")
    entries = zip(*(arrays[name][t].tolist() for name in names), strict=True)
    return [
        Extra(
            token_id=token_id,
            text=texts.token(token_id),
            logprob=logprob,
            behaviour_logprob=None if np.isnan(behaviour) else behaviour,
        )
        for token_id, logprob, behaviour in entries
        if token_id != UNUSED_ID
    ]


def _in_range(name: str, value: int, count: int, where: str) -> None:
    if not 0 <= value < count:
        expected = f"{name} 0 to {count - 1}"
        raise ConfigError(where, expected, f"{value}", f"Choose another --{name}.")
