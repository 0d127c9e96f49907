"""Batches of a dataset to fine-tune on, in the form and with the promises of a replay stream: any
number of ranks, packed, the order from a seed, a small state."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from stillroom.cache.errors import ConfigError, CorruptError, InputError, MismatchError
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import SOURCES
from stillroom.replay.batch import Batch, MicroBatch, Row, collate
from stillroom.replay.packing import balance, num_micro_batches
from stillroom.replay.place import Place, next_step, steps_in
from stillroom.replay.plan import permutation
from stillroom.replay.stream_checks import check_ranks
from stillroom.train.supervised_data import SupervisedConfig, SupervisedRows

STATE_FORMAT = 1
SOURCE = SOURCES.index("dataset")
DO = "Resume from another checkpoint."


class SupervisedStream:
    """Batches of one rank: K is 0, no teacher has scored anything, and all mass is in the tail.

    The rows of a step depend on the seed and the dataset alone; rank r of W takes those that come
    r-th, (r + W)-th, ... in it. A row takes 24 bytes beside those of the dataset.

    Args:
        rows: the dataset, whole on every rank.
        config: sizes and order.
        rank: this process, 0 to world - 1.
        world: number of processes.
        one_row: give each micro-batch one row, for students whose packed rows would see one
            another.
        empty: allocates arrays of batches, for memory that a GPU copies from; None: NumPy does.

    Raises:
        InputError: a step is larger than the dataset.
    """

    def __init__(
        self,
        rows: SupervisedRows,
        config: SupervisedConfig,
        *,
        rank: int = 0,
        world: int = 1,
        one_row: bool = False,
        empty: Empty | None = None,
    ) -> None:
        """Stand before the first step."""
        check_ranks(rank, world)
        if config.batch_rows > len(rows):
            where, expected = "supervised.batch_rows", f"at most the {len(rows)} rows"
            do = "Lower it, or train on more."
            raise InputError(where, expected, f"{config.batch_rows}", do)
        self._rows, self._config, self._rank, self._world = rows, config, rank, world
        self._most, self._empty = 1 if one_row else None, empty or np.empty
        self._place, self._step = Place(), 0
        self._order = lru_cache(2)(lambda epoch: permutation(len(rows), config.seed, epoch))
        self._lengths, self._digest = rows.lengths, rows.digest
        self._closed = False

    @property
    def snapshots(self) -> list[str]:
        """None: a dataset is no cache."""
        return []

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row came once."""
        return steps_in(len(self._rows), self._config.batch_rows, self._config.last_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, before its next batch: a few plain values."""
        return {
            "format": STATE_FORMAT,
            "rows": self._digest,
            "seed": self._config.seed,
            "last_batch": self._config.last_batch,
            "step": self._step,
            "epoch": self._place.epoch,
            "first": self._place.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state of a stream over the same rows in the same order; the number of ranks and
        batch_rows may be others.

        Raises:
            MismatchError: the state belongs to other rows, or another order.
            CorruptError: it is not a state, or names no place in that order.
        """
        self._check_open()
        own = self.state_dict()
        if not isinstance(state, dict) or state.keys() != own.keys():
            got = f"{state!r:.60}"
            raise CorruptError("supervised stream state", "what state_dict() gave", got, DO)
        for name in ("format", "rows", "seed", "last_batch"):
            if state[name] != own[name]:
                where, expected = f"supervised stream state, {name}", f"{own[name]!r}"
                raise MismatchError(where, expected, f"{state[name]!r}", DO)
        counts = [state["step"], state["epoch"], state["first"]]
        fits = all(type(count) is int and count >= 0 for count in counts)
        if not fits or state["first"] > len(self._rows):
            expected = f"a place in epochs of {len(self._rows)} rows"
            raise CorruptError("supervised stream state", expected, f"{counts!r:.60}", DO)
        self._step, self._place = state["step"], Place(state["epoch"], state["first"])

    def next_batch(self) -> Batch:
        """The next step's share of this rank."""
        self._check_open()
        config, count = self._config, len(self._rows)
        spans, after = next_step(self._place, config.batch_rows, lambda _: count, config.last_batch)
        rows = [row for s in spans for row in self._order(s.epoch)[s.start : s.stop].tolist()]
        batch = Batch(
            epoch=spans[0].epoch,
            first=spans[0].start,
            rows=tuple(rows),
            caches=(0,) * len(rows),
            num_positions=int(self._rows.positions[rows].sum()),
            micro_batches=self._packed(rows),
        )
        self._place, self._step = after, self._step + 1
        return batch

    def close(self) -> None:
        """The stream gives nothing any more."""
        self._closed = True

    def _packed(self, rows: Sequence[int]) -> tuple[MicroBatch | None, ...]:
        ranks = [rows[rank :: self._world] for rank in range(self._world)]
        tokens = [self._lengths[own].tolist() for own in ranks]
        limit, own = self._config.max_tokens, ranks[self._rank]
        count = num_micro_batches(tokens, limit, self._most)
        packed = balance(tokens[self._rank], count, limit, self._most)
        filled = [collate([self._row(own[i]) for i in part], empty=self._empty) for part in packed]
        return (*filled, *[None] * (count - len(filled)))

    def _row(self, number: int) -> Row:
        """A row as a shard would hold it; the teacher's mass is all in the tail."""
        start, stop = self._rows.start[number : number + 2]
        positions = int(self._rows.positions[number])
        arrays = {
            "token": self._rows.token[start:stop],
            "scored": self._rows.scored[start:stop],
            "prompt_length": np.zeros(1, np.uint32),
            "tail_logprob": np.zeros(positions, np.float16),
            "sampled_logprob": np.full(positions, -np.inf, np.float32),
            "behaviour_logprob": np.full(positions, np.nan, np.float32),
            "policy_version_min": np.full(1, -1),
            "source": np.full(1, SOURCE),
        }
        return Row(number, arrays, float("nan"))

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("stream", "an open stream", "a closed one", "Open another one.")
