"""What a step gets: packed rows with the teacher's scores, as NumPy arrays.

Shapes: T tokens of a micro-batch, R segments in it, P scored positions, K teacher entries, M extra
ids. A segment is a row; or a prompt that several rows share; or the completion of one of those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from stillroom.cache.errors import InputError, ShapeError
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import Arrays

LAYOUT: dict[str, tuple[str, type]] = {
    "token": ("T", np.int64),
    "position_id": ("T", np.int64),
    "row_start": ("E", np.int32),
    "prefix": ("R", np.int32),
    "predict_index": ("P", np.int64),
    "sampled_id": ("P", np.int64),
    "topk_id": ("PK", np.int32),
    "topk_logprob": ("PK", np.float16),
    "tail_logprob": ("P", np.float32),
    "sampled_logprob": ("P", np.float32),
    "behaviour_logprob": ("P", np.float32),
    "weight": ("P", np.float32),
    "policy_version": ("P", np.int64),
    "sampling_temperature": ("P", np.float32),
    "source": ("P", np.int64),
    "row": ("P", np.int64),
    "cache": ("P", np.int16),
    "extra_id": ("PM", np.int32),
    "extra_logprob": ("PM", np.float16),
    "extra_behaviour_logprob": ("PM", np.float32),
    "extra_likeliest": ("P", np.bool_),
}
"""Axes and dtype of each array of a micro-batch; E is R + 1."""

UNUSED = {
    "topk_id": -1,
    "topk_logprob": -np.inf,
    "extra_id": -1,
    "extra_logprob": -np.inf,
    "extra_behaviour_logprob": np.nan,
}
"""What stands in unused entries."""

ONE = np.ones(1, np.float32)


class Facts(NamedTuple):
    """What the small columns of a row say, once all its columns are known to agree in length."""

    target: np.ndarray
    """(P,) ascending integers: which of its tokens have a position."""
    source: int
    """Index into schema.SOURCES."""
    policy_version: int
    """Oldest policy that sampled it; -1 if unknown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence with its scores."""

    number: int
    """Its number in its snapshot."""
    arrays: Arrays
    """Every column of this one sequence, in the dtypes of a shard, but for those that `facts` stand
    for; and as `weight`, if the stream reads one, its weights: (P,) float32, or (1,) for all
    positions."""
    sampling_temperature: float
    """Temperature of its behaviour logprobs; NaN if unknown."""
    cache: int = 0
    """Index of the stream's source that it comes from."""
    extra_likeliest: bool = False
    """Whether its extra ids are known to be the sampler's likeliest tokens, and not draws."""
    facts: Facts | None = None
    """As its reader found them; None has `collate` look."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows laid end to end, without padding."""

    token: np.ndarray
    """(T,) int64."""
    position_id: np.ndarray
    """(T,) int64: restarts at 0 with every row; goes on after the prompt where that is shared."""
    row_start: np.ndarray
    """(R + 1,) int32: first token of each segment; the last entry is T."""
    prefix: np.ndarray
    """(R,) int32: the segment whose tokens come before this one's (a shared prompt, which stands
    earlier and has no prefix itself); -1 for none."""
    predict_index: np.ndarray
    """(P,) int64: index of the token whose hidden state predicts the position; the one before the
    token that it scores, which in a shared prompt predicts several."""
    sampled_id: np.ndarray
    """(P,) int64: the token that it scores."""
    topk_id: np.ndarray
    """(P, K) int32 token ids; -1 where unused."""
    topk_logprob: np.ndarray
    """(P, K) float16 nats; -inf where unused."""
    tail_logprob: np.ndarray
    """(P,) float32 nats; -inf where the entries are the whole vocabulary."""
    sampled_logprob: np.ndarray
    """(P,) float32 nats, the teacher's."""
    behaviour_logprob: np.ndarray
    """(P,) float32 nats; NaN where unknown."""
    weight: np.ndarray
    """(P,) float32, finite and >= 0: what the position's loss is multiplied by, from the column
    that `StreamConfig.weight_column` names; 1 without one."""
    policy_version: np.ndarray
    """(P,) int64: oldest policy that sampled the row; -1 if unknown."""
    sampling_temperature: np.ndarray
    """(P,) float32; NaN if unknown, and then `behaviour_logprob` compares with nothing."""
    source: np.ndarray
    """(P,) int64: index into schema.SOURCES."""
    row: np.ndarray
    """(P,) int64: number of the position's row in the snapshot of its cache."""
    cache: np.ndarray
    """(P,) int16: index of the stream's source that the position comes from."""
    extra_id: np.ndarray
    """(P, M) int32: ids that the student chose, or draws from the teacher's tail, as the cache's
    identity says; M is 0 without them; -1 where unused."""
    extra_logprob: np.ndarray
    """(P, M) float16 nats, the teacher's; -inf where unused."""
    extra_behaviour_logprob: np.ndarray
    """(P, M) float32 nats: of the policy that chose them, or of the draw given the tail; NaN where
    unknown or unused."""
    extra_likeliest: np.ndarray
    """(P,) bool: the extra ids are known to be the sampler's likeliest tokens, and not draws."""

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.sampled_id)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of one step."""

    epoch: int
    first: int
    """g of the step's first row: where the step begins in its epoch."""
    rows: tuple[int, ...]
    """Snapshot rows of the whole step, all ranks, in replay order."""
    caches: tuple[int, ...]
    """Index of the stream's source of each of them."""
    num_positions: int
    """N, scored tokens of the whole step, all ranks: what the loss is divided by."""
    micro_batches: tuple[MicroBatch | None, ...]
    """This rank's; None is one that only keeps step with the other ranks."""


def collate(
    rows: Sequence[Row], *, groups: Sequence[int] | None = None, empty: Empty = np.empty
) -> MicroBatch:
    """Lay rows end to end; rows of caches with smaller K or M get unused entries.

    Args:
        rows: one at least.
        groups: a number for each row; neighbours with the same one have the same prompt, which is
            laid down once before their completions. None shares nothing.
        empty: allocates the results.

    Raises:
        InputError: rows of one group differ in their prompts, a token id is 2**31 or more, or a
            weight is negative, infinite or NaN.
        ShapeError: columns of a row disagree in length.
    """
    facts = [_facts(row) if row.facts is None else row.facts for row in rows]
    segments = _segments(rows, groups)
    lengths = [segment.stop - segment.start for segment in segments]
    counts = [len(fact.target) for fact in facts]
    sizes = {
        "T": sum(lengths),
        "E": len(segments) + 1,
        "R": len(segments),
        "P": sum(counts),
        "K": max(_width(row, "topk_id") for row in rows),
        "M": max(_width(row, "extra_id") for row in rows),
    }
    out = _allocate(sizes, empty)
    out["row_start"][0] = 0
    out["row_start"][1:] = np.cumsum(lengths)
    out["prefix"][:] = [segment.prefix for segment in segments]
    tokens = [rows[s.row].arrays["token"][s.start : s.stop] for s in segments]
    np.concatenate(tokens, out=out["token"])
    place = np.arange(max(segment.stop for segment in segments))
    np.concatenate([place[s.start : s.stop] for s in segments], out=out["position_id"])
    _point(out, segments, facts)
    _copy_facts(out, rows, facts, counts)
    _copy_scores(out, rows, counts)
    return MicroBatch(**out)


def idle_micro_batch() -> MicroBatch:
    """One token and nothing scored but a dummy: for a rank that must only keep step."""
    out = _allocate({"T": 1, "E": 2, "R": 1, "P": 1, "K": 0, "M": 0}, np.zeros)
    out["row_start"][1], out["prefix"][0], out["sampling_temperature"][0] = 1, -1, 1
    for name in ("tail_logprob", "sampled_logprob", "behaviour_logprob"):
        out[name][0] = np.nan
    out["weight"][0] = 1
    return MicroBatch(**out)


def _facts(row: Row) -> Facts:
    """Those of a row that came without.

    Raises:
        ShapeError: columns disagree in length.
    """
    arrays = row.arrays
    target = np.flatnonzero(arrays["scored"])
    _check_lengths(row, len(target))
    return Facts(target, int(arrays["source"][0]), int(arrays["policy_version_min"][0]))


class _Segment(NamedTuple):
    """Tokens start to stop of a row; `prefix` is the segment before them, or -1."""

    row: int
    start: int
    stop: int
    prefix: int


def _segments(rows: Sequence[Row], groups: Sequence[int] | None) -> list[_Segment]:
    lengths = [len(row.arrays["token"]) for row in rows]
    if groups is None:
        return [_Segment(i, 0, length, -1) for i, length in enumerate(lengths)]
    out: list[_Segment] = []
    for _, together in groupby(range(len(rows)), key=lambda i: groups[i]):
        first, *others = together
        prompt = _common_prompt(rows, first, others) if others else 0
        prefix = len(out) if others else -1
        if others:
            out.append(_Segment(first, 0, prompt, -1))
        out += [_Segment(i, prompt, lengths[i], prefix) for i in (first, *others)]
    return out


def _common_prompt(rows: Sequence[Row], first: int, others: Sequence[int]) -> int:
    """Tokens of the prompt that the rows share; fewer where a row was cut within its prompt."""
    shortest = min(len(rows[i].arrays["token"]) for i in (first, *others))
    full = int(rows[first].arrays["prompt_length"][0])
    length = min(full, shortest)
    prompt = rows[first].arrays["token"][:length]
    for i in others:
        arrays = rows[i].arrays
        same = np.array_equal(arrays["token"][:length], prompt)
        if arrays["prompt_length"][0] != full or not same:
            expected = f"the prompt of row {rows[first].number}, whose group it is in"
            do = "Give one group number to rows of one prompt only; run 'stillroom verify'."
            raise InputError(f"row {rows[i].number}", expected, "another prompt", do)
    return length


def _point(out: Arrays, segments: Sequence[_Segment], facts: Sequence[Facts]) -> None:
    """Write where positions are predicted and what they score, from where they are in their rows.

    `shift` is what leads from a token's index in its row to that in the micro-batch, by segment.
    """
    start = np.array([segment.start for segment in segments])
    shift = out["row_start"][:-1] - start
    last = {segment.row: i for i, segment in enumerate(segments)}
    own = np.repeat([last[i] for i in range(len(facts))], [len(fact.target) for fact in facts])
    target = np.concatenate([fact.target for fact in facts])
    place = target + shift[own]
    out["sampled_id"][:] = out["token"][place]
    out["predict_index"][:] = place - 1
    if start.any():
        in_prompt = np.flatnonzero(target <= start[own])
        own = own[in_prompt]
        out["predict_index"][in_prompt] += shift[out["prefix"][own]] - shift[own]


def _copy_facts(
    out: Arrays, rows: Sequence[Row], facts: Sequence[Facts], counts: Sequence[int]
) -> None:
    """Write at each position what is true of its row."""
    of_row: dict[str, list[int] | list[float] | list[bool]] = {
        "policy_version": [fact.policy_version for fact in facts],
        "sampling_temperature": [row.sampling_temperature for row in rows],
        "source": [fact.source for fact in facts],
        "row": [row.number for row in rows],
        "cache": [row.cache for row in rows],
        "extra_likeliest": [row.extra_likeliest for row in rows],
    }
    for name, values in of_row.items():
        out[name][:] = np.repeat(values, counts) if len(set(values)) > 1 else values[0]


def _copy_scores(out: Arrays, rows: Sequence[Row], counts: Sequence[int]) -> None:
    """Write the columns along positions; each big array is moved once."""
    _copy_weights(out["weight"], rows, counts)
    for name in ("tail_logprob", "sampled_logprob", "behaviour_logprob"):
        np.concatenate([row.arrays[name] for row in rows], out=out[name])
    for name, unused in UNUSED.items():
        if out[name].shape[1]:
            _copy_entries(out[name], name, unused, rows, counts)


def _copy_weights(out: np.ndarray, rows: Sequence[Row], counts: Sequence[int]) -> None:
    if not any("weight" in row.arrays for row in rows):
        out[:] = 1
        return
    given = zip(rows, counts, strict=True)
    own = [np.broadcast_to(row.arrays.get("weight", ONE), count) for row, count in given]
    np.concatenate(own, out=out)
    (bad,) = np.nonzero(~((out >= 0) & (out < np.inf)))
    if len(bad):
        row = rows[np.searchsorted(np.cumsum(counts), bad[0], side="right")]
        where, expected = f"row {row.number}, its weights", "finite numbers of 0 or more"
        do = "Correct the column in a new cache, or name another in replay.weight_column."
        raise InputError(where, expected, f"{out[bad[0]]}", do)


def _copy_entries(
    out: np.ndarray, name: str, unused: float, rows: Sequence[Row], counts: Sequence[int]
) -> None:
    """Write a column of entries (P, n); ids as int32, in which the mark of unused ones is -1."""
    target = out.view(np.uint32) if name.endswith("_id") else out
    if all(_width(row, name) == out.shape[1] for row in rows):
        np.concatenate([row.arrays[name] for row in rows], out=target)
    else:
        out[:] = unused
        for row, stop, count in zip(rows, np.cumsum(counts), counts, strict=True):
            if _width(row, name):
                target[stop - count : stop, : _width(row, name)] = row.arrays[name]
    if target is not out and out.min(initial=0) < -1:
        at, column = np.argwhere(out < -1)[0]
        row = rows[np.searchsorted(np.cumsum(counts), at, side="right")]
        where, got = f"row {row.number}, {name}", str(target[at, column])
        expected = "token ids below 2**31"
        raise InputError(where, expected, got, "Run 'stillroom verify'.")


def _check_lengths(row: Row, positions: int) -> None:
    given = len(row.arrays.get("weight", ONE))
    if given not in (1, positions):
        where, expected = f"row {row.number}, its weights", f"1 or {positions} of them"
        raise ShapeError(where, expected, f"{given}", "Run 'stillroom verify'.")
    for name in ("tail_logprob", "sampled_logprob", "behaviour_logprob", *UNUSED):
        found = len(row.arrays[name]) if name in row.arrays else positions
        if found != positions:
            expected = f"{positions} positions, as are scored"
            do = "Run 'stillroom verify'."
            raise ShapeError(f"row {row.number}, {name}", expected, f"{found}", do)


def _width(row: Row, name: str) -> int:
    """K or M of a row; 0 where it has no such column."""
    return row.arrays[name].shape[1] if name in row.arrays else 0


def _allocate(sizes: dict[str, int], empty: Empty) -> Arrays:
    return {
        name: empty(tuple(sizes[axis] for axis in axes), dtype)
        for name, (axes, dtype) in LAYOUT.items()
    }
