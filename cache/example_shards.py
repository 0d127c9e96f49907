"""Whole shards of random values, for tests of shard formats: gaps in the scored mask, prompts that
only the teacher saw, unused entries, extra ids and user columns, each where it is asked for."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from stillroom.cache.schema import COLUMNS, FINISH_REASONS, SOURCES, UNUSED_ID, Arrays, Axis

LARGEST = {
    "prompt_id": 2**64 - 1,
    "group": 2**64 - 1,
    "rollout_id": 2**64 - 1,
    "sample_index": 2**32 - 1,
    "finish_reason": len(FINISH_REASONS) - 1,
    "source": len(SOURCES) - 1,
    "policy_version_min": 2**31 - 1,
    "policy_version_max": 2**31 - 1,
    "ends_with_stop": 1,
}
UNKNOWN = ("policy_version_min", "policy_version_max")
"""Columns that have -1 here and there."""
USER_AXES: Final[dict[str, Axis]] = {"x_reward": "sequence", "x_advantage": "position"}
"""Axes of the user columns, which their lengths do not tell where P = S."""


def random_shard(
    seed: int,
    positions: int,
    sequences: int,
    *,
    topk: int,
    vocab_size: int,
    extra: int = 0,
    mass: bool = False,
    teacher_prompts: bool = True,
    user_columns: bool = False,
) -> Arrays:
    """Every column of a shard, as `check_arrays` wants it.

    Args:
        seed: equal seeds give equal arrays.
        positions: P, at least 1.
        sequences: S, 1 to P; each has a position.
        topk: K, at most `vocab_size`; where it equals that and all entries are used, no tail is
            left.
        vocab_size: ids are below it; the largest one is there.
        extra: M; 0 leaves the extra columns out.
        mass: whether entries are unused at random, as after a mass cut-off.
        teacher_prompts: whether some sequences have one.
        user_columns: whether to add those of `USER_AXES`.
    """
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, positions), sequences - 1, replace=False))
    counts = np.diff(np.concatenate([[0], cuts, [positions]]))
    own = rng.integers(0, 4, sequences) * rng.integers(0, 2, sequences) * teacher_prompts
    arrays = _entries(rng, positions, topk, vocab_size, mass)
    if extra:
        arrays |= _extra(rng, positions, extra, vocab_size)
    arrays |= _tokens(rng, counts, vocab_size)
    arrays["position_start"] = edges(counts)
    arrays["teacher_prompt"] = rng.integers(0, vocab_size, int(own.sum()), np.uint32)
    arrays["teacher_prompt_start"] = edges(own)
    dtypes = {column.name: column.dtype for column in COLUMNS}
    for name, largest in LARGEST.items():
        dtype = np.dtype(dtypes[name]).type
        arrays[name] = rng.integers(0, largest, sequences, dtype, endpoint=True)
        if name in UNKNOWN:
            arrays[name][rng.random(sequences) < 0.3] = -1
    sizes = {"sequence": sequences, "position": positions}
    for name, axis in USER_AXES.items() if user_columns else ():
        arrays[name] = rng.normal(size=sizes[axis]).astype(np.float32)
    return arrays


def strange_floats(arrays: Arrays, seed: int) -> Arrays:
    """The same shard with any bits in its floats: NaN of any kind, -0.0, infinities, subnormal
    numbers. What has no id keeps its values, which are fixed."""
    rng = np.random.default_rng(seed)
    ids = {"topk_logprob": "topk_id"} | dict.fromkeys(
        ("extra_logprob", "extra_behaviour_logprob"), "extra_id"
    )
    out = dict(arrays)
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            continue
        unsigned = np.dtype(f"u{array.itemsize}")
        bits = rng.integers(0, 2 ** (8 * array.itemsize), array.shape, unsigned)
        tiny = np.finfo(array.dtype).smallest_subnormal
        special = np.array([-0.0, 0.0, -np.inf, np.inf, np.nan, tiny], array.dtype).view(unsigned)
        often = rng.choice(np.append(special, special[4] | unsigned.type(1)), array.shape)
        value = np.where(rng.random(array.shape) < 0.5, bits, often)
        if name in ids:
            kept = arrays[ids[name]] != UNUSED_ID
            value = np.where(kept, value, array.view(unsigned))
        out[name] = value.view(array.dtype)
    return out


def edges(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """(S + 1,) uint64: where sequences of these lengths begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def _entries(
    rng: np.random.Generator, positions: int, topk: int, vocab_size: int, mass: bool
) -> Arrays:
    first = (vocab_size * rng.random(positions) ** 3).astype(np.int64)
    ids = (first[:, None] + rng.permuted(np.tile(np.arange(topk), (positions, 1)), axis=1)) % (
        vocab_size
    )
    ids[0] = vocab_size - 1 - np.arange(topk)
    logprob = -np.sort(30 * rng.random((positions, topk)), axis=1).astype(np.float16)
    count = rng.integers(1, topk + 1, positions) if mass else np.full(positions, topk)
    unused = np.arange(topk) >= count[:, None]
    tail = (-20 * rng.random(positions)).astype(np.float16)
    tail[(rng.random(positions) < 0.2) | (count == vocab_size)] = -np.inf
    behaviour = -rng.random(positions, np.float32)
    behaviour[rng.random(positions) < 0.3] = np.nan
    return {
        "topk_id": np.where(unused, UNUSED_ID, ids).astype(np.uint32),
        "topk_logprob": np.where(unused, np.float16(-np.inf), logprob),
        "topk_count": count.astype(np.uint16),
        "tail_logprob": tail,
        "sampled_logprob": -30 * rng.random(positions, np.float32),
        "behaviour_logprob": behaviour,
    }


def _extra(rng: np.random.Generator, positions: int, extra: int, vocab_size: int) -> Arrays:
    shape = (positions, extra)
    unused = rng.random(shape) < 0.2
    logprob = (-30 * rng.random(shape)).astype(np.float16)
    given = -30 * rng.random(shape, np.float32)
    ids = rng.integers(0, vocab_size, shape, np.uint32)
    ids[0], unused[0] = vocab_size - 1, False
    return {
        "extra_id": np.where(unused, np.uint32(UNUSED_ID), ids),
        "extra_logprob": np.where(unused, np.float16(-np.inf), logprob),
        "extra_behaviour_logprob": np.where(unused, np.float32(np.nan), given),
    }


def _tokens(rng: np.random.Generator, counts: np.ndarray, vocab_size: int) -> Arrays:
    prompts = rng.integers(1, 6, len(counts))
    gaps = rng.integers(0, 3, len(counts))
    masks = [
        np.concatenate([np.zeros(p, np.int64), rng.permutation(np.repeat([1, 0], [c, g]))])
        for p, c, g in zip(prompts, counts, gaps, strict=True)
    ]
    scored = np.concatenate(masks).astype(np.uint16)
    return {
        "token": rng.integers(0, vocab_size, len(scored), np.uint32),
        "scored": scored,
        "sequence_start": edges([len(mask) for mask in masks]),
        "prompt_length": prompts.astype(np.uint32),
    }
