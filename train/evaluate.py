"""Held-out measurement: how far a student is from the teacher on scored text, without training on
it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from stillroom.cache.schema import SOURCES
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import select
from stillroom.replay.stream import ReplayStream
from stillroom.train.hidden_kl import hidden_kl_bound
from stillroom.train.objectives import divergence, student_bucket_logprob
from stillroom.train.student import Student, to_target
from stillroom.train.target import teacher_buckets


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the positions of one source."""

    positions: int
    forward_kl_nats: float
    """KL(teacher, student) over {top k, sampled token, tail}; at most the full-vocabulary KL."""
    reverse_kl_nats: float
    """KL(student, teacher) over the same buckets; at most the full-vocabulary KL."""
    teacher_tail_mass: float
    """Teacher's probability outside its top k and the sampled token."""
    student_tail_mass: float
    """Student's probability outside the same tokens."""
    hidden_kl_bound_nats: float
    """The most by which the full-vocabulary forward KL can exceed `forward_kl_nats`."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, and on how much of the text."""

    sources: dict[str, Measured]
    """For each source that occurs (student, teacher, ...) the means over its positions."""
    rows: int
    """Rows that were measured."""
    left_out: dict[str, int]
    """Rows that were not, by the reason."""
    truncated: int
    """Measured rows that lost their last tokens."""


@torch.no_grad()
def evaluate(
    student: Student, cache: Cache, snapshot: Snapshot, replay: StreamConfig
) -> Evaluation:
    """Measure a student on a snapshot, by the source of its text.

    Args:
        student: in any mode; put into eval mode here.
        cache: the cache of held-out text.
        snapshot: which shards.
        replay: sizes of batches, and what happens to rows that are longer than a micro-batch.

    Raises:
        InputError: no row is left, or one is too long and is not to be skipped or truncated.
    """
    student.eval()
    limit, over_long = replay.max_tokens, replay.over_long
    selection = select(cache, snapshot, RowFilter(), max_tokens=limit, over_long=over_long)
    values, sources = [], []
    for batch in _all_steps(student, cache, snapshot, replay, len(selection.rows)):
        for micro in batch.micro_batches:
            assert micro is not None
            logits = student(micro)
            target = to_target(micro, logits.device)
            temperature, vocab_size = cache.identity.temperature, cache.identity.vocab_size
            forward, reverse = (
                divergence(logits, target, kind, temperature=temperature, vocab_size=vocab_size)
                for kind in ("forward", "reverse")
            )
            buckets = teacher_buckets(target, vocab_size)
            scaled = logits[:, :vocab_size].float() / temperature
            tail = student_bucket_logprob(scaled, buckets)[:, -1].exp()
            teacher_tail = buckets.logprob[:, -1].exp().float()
            figures = [forward, reverse, teacher_tail, tail, hidden_kl_bound(scaled, buckets)]
            values.append(torch.stack(figures, dim=1).cpu().numpy())
            sources.append(micro.source)
    value, source = np.concatenate(values).astype(np.float64), np.concatenate(sources)
    means = {
        SOURCES[code]: Measured(
            int((source == code).sum()), *map(float, value[source == code].mean(0))
        )
        for code in np.unique(source)
    }
    return Evaluation(means, len(selection.rows), selection.left_out, selection.truncated)


def _all_steps(
    student: Student, cache: Cache, snapshot: Snapshot, replay: StreamConfig, rows: int
) -> Iterator[Batch]:
    config = StreamConfig(
        batch_rows=min(replay.batch_rows, rows),
        max_tokens=replay.max_tokens,
        over_long=replay.over_long,
        block_rows=replay.block_rows,
        window_rows=replay.window_rows,
        cached_bytes=replay.cached_bytes,
        ahead_bytes=replay.ahead_bytes,
        threads=replay.threads,
    )
    with ReplayStream(Source(cache, snapshot), config, one_row=not student.packs) as stream:
        for _ in range(stream.steps_per_epoch):
            yield stream.next_batch()


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values: each source's means, and the numbers of rows as `rows`."""
    counts = {"measured": evaluation.rows, "truncated": evaluation.truncated}
    means = {source: asdict(values) for source, values in evaluation.sources.items()}
    return {**means, "rows": {**counts, "left_out": evaluation.left_out}}
