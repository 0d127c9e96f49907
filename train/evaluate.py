"""Held-out measurement: how far a student is from the teacher on scored text, without training on
it. Logits are held for a few positions at a time."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from stillroom.cache.identity import Identity
from stillroom.cache.schema import SOURCES
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch, idle_micro_batch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import Selection, select
from stillroom.replay.stream import ReplayStream
from stillroom.train.hidden_kl import hidden_kl_bound
from stillroom.train.logit_chunks import logit_chunks
from stillroom.train.objectives import kl_terms
from stillroom.train.output_head import OutputHead
from stillroom.train.parallel import Parallel
from stillroom.train.ranks import from_every_rank
from stillroom.train.student import Student, to_target
from stillroom.train.student_buckets import masses
from stillroom.train.target import TeacherTarget, teacher_buckets

COPIES = 8
"""Of a chunk's logits, at most, that measuring it holds at once."""


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


FIGURES = tuple(field.name for field in fields(Measured))[1:]


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

    @property
    def reverse_kl_nats(self) -> float:
        """Mean of the reverse KL over all positions, whatever their source."""
        measured = self.sources.values()
        total = sum(one.positions * one.reverse_kl_nats for one in measured)
        return total / sum(one.positions for one in measured)


@torch.no_grad()
def evaluate(
    student: Student,
    cache: Cache,
    snapshot: Snapshot,
    replay: StreamConfig,
    *,
    parallel: Parallel | None = None,
    max_bytes: int = 1 << 28,
) -> Evaluation:
    """Measure a student on a snapshot, by the source of its text.

    Args:
        student: in any mode, which it has again afterwards; measured in eval mode.
        cache: the cache of held-out text.
        snapshot: which shards.
        replay: sizes of batches, and what happens to rows that are longer than a micro-batch.
        parallel: what the student is trained with, where it is: each rank measures its share, and
            all get the whole; every rank calls this. None: this process measures all.
        max_bytes: memory beyond the hidden states.

    Raises:
        InputError: no row is left, or one is too long and is not to be skipped or truncated.
    """
    selection = measured_rows(cache, snapshot, replay)
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    sums = np.zeros((len(SOURCES), 1 + len(FIGURES)))
    was_training = student.training
    student.eval()
    for batch in _all_steps(student, cache, snapshot, replay, len(selection.rows), rank, world):
        for micro in batch.micro_batches:
            arguments = student, micro, cache.identity, max_bytes // COPIES
            found = _figures(*arguments) if parallel is None else parallel.run(_figures, *arguments)
            if micro is not None:
                ones = torch.ones(len(found), 1, dtype=torch.float64)
                counted = torch.cat([ones, found.double().cpu()], dim=1).numpy()
                np.add.at(sums, micro.source, counted)
    student.train(was_training)
    total = sum(from_every_rank(sums)) if parallel is not None else sums
    means = {
        name: Measured(int(row[0]), *map(float, row[1:] / row[0]))
        for name, row in zip(SOURCES, total, strict=True)
        if row[0]
    }
    return Evaluation(means, len(selection.rows), selection.left_out, selection.truncated)


def measured_rows(cache: Cache, snapshot: Snapshot, replay: StreamConfig) -> Selection:
    """The rows that `evaluate` would measure.

    Raises:
        InputError: no row is left, or one is too long and is not to be skipped or truncated.
    """
    limit, over_long = replay.max_tokens, replay.over_long
    return select(cache, snapshot, RowFilter(), max_tokens=limit, over_long=over_long)


def _figures(
    student: Student, micro: MicroBatch | None, identity: Identity, max_bytes: int
) -> torch.Tensor:
    """(P, FIGURES) of a micro-batch; an idle one only keeps step with other ranks."""
    batch = idle_micro_batch() if micro is None else micro
    hidden = student.hidden(batch)
    target = to_target(batch, hidden.device, extras=identity.extra_kind == "student")
    found = hidden.new_zeros(len(hidden), len(FIGURES), dtype=torch.float32)
    if micro is None:
        return found
    head, vocab_size = OutputHead.of(student.model), identity.vocab_size
    for rows, logits in logit_chunks(
        head, hidden, max_bytes, temperature=identity.temperature, vocab_size=vocab_size
    ):
        found[rows] = _compare(logits, target.slice(rows.start, rows.stop), vocab_size)
    return found


def _compare(logits: torch.Tensor, target: TeacherTarget, vocab_size: int) -> torch.Tensor:
    """(n, FIGURES) of logits (n, V) over the temperature."""
    buckets = teacher_buckets(target, vocab_size)
    both = masses(logits, buckets, 1.0)
    floored = teacher_buckets(target, vocab_size, floor_tail=True).logprob[both.row]
    compared = (
        kl_terms(both.teacher, both.student).sum(1),
        kl_terms(both.student, floored.to(both.student.dtype)).sum(1),
        both.teacher[:, -1].exp(),
        both.student[:, -1].exp(),
    )
    spread = [both.spread(one, len(logits)) for one in compared]
    return torch.stack([*spread, hidden_kl_bound(logits, buckets)], dim=1).float()


def _all_steps(
    student: Student,
    cache: Cache,
    snapshot: Snapshot,
    replay: StreamConfig,
    rows: int,
    rank: int,
    world: int,
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
    source, one_row = Source(cache, snapshot), not student.packs
    with ReplayStream(source, config, rank=rank, world=world, one_row=one_row) as stream:
        for _ in range(stream.steps_per_epoch):
            yield stream.next_batch()


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values: each source's means, and the numbers of rows as `rows`."""
    counts = {"measured": evaluation.rows, "truncated": evaluation.truncated}
    means = {source: asdict(values) for source, values in evaluation.sources.items()}
    return {**means, "rows": {**counts, "left_out": evaluation.left_out}}
