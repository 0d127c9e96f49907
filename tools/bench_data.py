"""Scores to measure a store on: those of a cache, or ones that are made up.

Made-up scores are good for speeds only: how small real ones become depends on the teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.errors import InputError
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.schema import BY_NAME, COLUMNS, EDGE_OF, Arrays, column_of
from stillroom.cache.store import Cache

VOCAB_SIZE = 49_152
TOPICS = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One shard's worth of scores."""

    arrays: Arrays
    identity: Identity
    source: str
    """Where they come from, for people."""

    @property
    def positions(self) -> int:
        """Scored tokens."""
        return len(self.arrays["sampled_logprob"])


def from_cache(cache: Cache, positions: int) -> Sample:
    """The first live parts of a cache joined until there are so many positions.

    Raises:
        InputError: no part is scored.
    """
    parts: list[Arrays] = []
    live = {part: n for part, n in cache.commits().items() if part not in cache.retired()}
    for part, n in sorted(live.items()):
        commit = read_commit(cache.storage, commit_path(part, n))
        parts.append(cache.shard(commit).all_rows())
        if sum(len(p["sampled_logprob"]) for p in parts) >= positions:
            break
    if not parts:
        do = "Score some, or leave the root out."
        raise InputError(cache.storage.root, "scored parts", "none", do)
    return Sample(join(parts), cache.identity, cache.storage.root)


def join(parts: list[Arrays]) -> Arrays:
    """Shards' columns end to end."""
    edges = set(EDGE_OF.values())
    out = {}
    for name in parts[0].keys() & set.intersection(*(set(p) for p in parts)):
        if name not in edges:
            out[name] = np.concatenate([p[name] for p in parts])
            continue
        lengths = np.concatenate([np.diff(p[name].astype(np.int64)) for p in parts])
        out[name] = np.concatenate([[0], np.cumsum(lengths)]).astype(BY_NAME[name].dtype)
    return {name: out[name] for name in [*(c.name for c in COLUMNS), *sorted(out)] if name in out}


def made_up(positions: int, topk: int, *, longest: int = 900, seed: int = 0) -> Sample:
    """Scores with a heavy-tailed vocabulary, topics, and logits on the grid of bfloat16; sequences
    have 100 to `longest` positions."""
    rng = np.random.default_rng(seed)
    width = max(1024, 2 * topk)
    often = (rng.pareto(0.6, (TOPICS, width)) * 20).astype(np.int64) % VOCAB_SIZE
    topic_ids = np.sort(often, axis=1)
    for row in topic_ids:
        row[:] = rng.permutation(np.union1d(row, rng.permutation(VOCAB_SIZE)[: 2 * width])[:width])
    blocks = list(_scores(rng, topic_ids, positions, topk))
    arrays = {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]}
    arrays |= _sequences(rng, arrays["sampled_id"], longest)
    sampled = arrays.pop("sampled_id")
    arrays["token"][arrays["scored"] == 1] = sampled
    identity = Identity(
        teacher=TeacherId(
            name="made-up",
            revision=None,
            weight_format="none",
            compute_dtype="bfloat16",
            fingerprint="0" * 32,
        ),
        tokenizer_fingerprint="0" * 32,
        vocab_size=VOCAB_SIZE,
        logit_width=VOCAB_SIZE,
        topk=topk,
    )
    return Sample(arrays, identity, "made-up scores")


def _scores(
    rng: np.random.Generator, topic_ids: np.ndarray, positions: int, topk: int
) -> Iterator[Arrays]:
    common = 12 - 1.3 * np.log1p(np.arange(topic_ids.shape[1], dtype=np.float32))
    for start in range(0, positions, 4096):
        count = min(4096, positions - start)
        logit = common + rng.standard_normal((count, len(common)), np.float32) * 1.5
        logit = np.round(logit * 8) / 8
        best = np.argpartition(-logit, topk - 1, axis=1)[:, :topk]
        ids = topic_ids[rng.integers(0, TOPICS, count)[:, None], best]
        lse = np.log(np.exp(logit).sum(axis=1, dtype=np.float64) * 1.02)
        yield _top(rng, ids, np.take_along_axis(logit, best, 1) - lse[:, None])


def _top(rng: np.random.Generator, ids: np.ndarray, logprob: np.ndarray) -> Arrays:
    topk = ids.shape[1]
    top = logprob.astype(np.float16)
    order = np.lexsort((ids, -top.astype(np.float32)), axis=-1)
    top, ids = np.take_along_axis(top, order, 1), np.take_along_axis(ids, order, 1)
    tail = np.log(np.maximum(1 - np.exp(top.astype(np.float64)).sum(axis=1), 1e-4))
    picked = np.minimum(rng.geometric(0.5, len(ids)) - 1, topk - 1)[:, None]
    sampled = np.take_along_axis(top, picked, 1)[:, 0].astype(np.float32)
    noise = rng.normal(0, 0.02, len(ids)).astype(np.float32)
    return {
        "topk_id": ids.astype(np.uint32),
        "topk_logprob": top,
        "topk_count": np.full(len(ids), topk, np.uint16),
        "tail_logprob": tail.astype(np.float16),
        "sampled_logprob": sampled,
        "behaviour_logprob": np.minimum(sampled + noise, 0),
        "sampled_id": np.take_along_axis(ids, picked, 1)[:, 0].astype(np.uint32),
    }


def _sequences(rng: np.random.Generator, sampled: np.ndarray, longest: int) -> Arrays:
    lengths: list[int] = []
    while sum(lengths) < len(sampled):
        lengths.append(min(int(rng.integers(100, longest)), len(sampled) - sum(lengths)))
    count, completion = len(lengths), np.array(lengths)
    prompt = np.repeat(rng.integers(60, 180, -(-count // 4)), 4)[:count]
    starts = np.concatenate([[0], np.cumsum(prompt + completion)])
    is_prompt = np.arange(starts[-1]) - np.repeat(starts[:-1], prompt + completion) < np.repeat(
        prompt, prompt + completion
    )
    number = np.arange(count, dtype=np.uint64)
    arrays: Arrays = {
        "token": rng.choice(sampled, starts[-1]),
        "scored": (~is_prompt).astype(np.uint16),
        "sequence_start": starts.astype(np.uint64),
        "position_start": np.concatenate([[0], np.cumsum(completion)]).astype(np.uint64),
        "teacher_prompt": np.zeros(0, np.uint32),
        "teacher_prompt_start": np.zeros(count + 1, np.uint64),
        "prompt_length": prompt.astype(np.uint32),
        "group": number // 4,
        "sample_index": (number % 4).astype(np.uint32),
        "rollout_id": rng.integers(0, 2**63, count).astype(np.uint64),
        "prompt_id": np.repeat(rng.integers(0, 2**63, -(-count // 4)), 4)[:count].astype(np.uint64),
    }
    for name in BY_NAME:
        if column_of(name).axis == "sequence" and name not in arrays:
            arrays[name] = np.zeros(count, column_of(name).dtype)
    return arrays
