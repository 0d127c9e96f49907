"""Columns with a number a row, and counts of scored tokens, of a snapshot's shards; what is known
of a shard is not read again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stillroom.cache.errors import InputError
from stillroom.cache.schema import Arrays
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache

UNCOUNTED = -1


@dataclass(slots=True)
class ShardFacts:
    """What was read of one shard."""

    columns: Arrays = field(default_factory=dict)
    """(rows,) each, by name."""
    within: np.ndarray | None = None
    """(rows,) int64: positions among the first tokens of each row, UNCOUNTED of most."""


Known = dict[str, ShardFacts]
"""By the digest of the shard's commit. Counts are for one number of first tokens."""


class ShardColumns:
    """Reads of a snapshot's shards; none stays open. Threads may share it.

    Args:
        cache: where the shards are.
        snapshot: which.
        known: what earlier reads found, to which later ones are added; None keeps no columns.
    """

    def __init__(self, cache: Cache, snapshot: Snapshot, known: Known | None) -> None:
        """Read nothing yet."""
        self._cache, self._commits = cache, snapshot.commits
        self._keeps, self._known = known is not None, {} if known is None else known

    def read(self, part: int, names: Sequence[str]) -> Arrays:
        """Whole columns of a shard, by name.

        Raises:
            InputError: the shard has no such column, or one with a number a position.
            CorruptError: its bytes are damaged.
        """
        if not self._keeps:
            return self._read(part, names)
        columns = self._facts(part).columns
        unread = [name for name in names if name not in columns]
        if unread:
            columns |= self._read(part, unread)
        return {name: columns[name] for name in names}

    def counted(self, part: int) -> np.ndarray:
        """(rows,) int64: what `count` has found of a shard's rows so far, UNCOUNTED elsewhere."""
        facts = self._facts(part)
        if facts.within is None:
            facts.within = np.full(self._commits[part].rows, UNCOUNTED, np.int64)
        return facts.within

    def count(self, part: int, rows: np.ndarray, spans: np.ndarray) -> None:
        """Count scored tokens of some of a shard's rows, within a span each of its tokens.

        Args:
            part: the shard.
            rows: (n,) numbers in the shard.
            spans: (n, 2) first token, and the one after the last.
        """
        shard = self._cache.shard(self._commits[part])
        scored = shard.read_ranges([("scored", start, stop) for start, stop in spans.tolist()])
        self.counted(part)[rows] = [np.count_nonzero(array) for array in scored]

    def _facts(self, part: int) -> ShardFacts:
        return self._known.setdefault(self._commits[part].digest(), ShardFacts())

    def _read(self, part: int, names: Sequence[str]) -> Arrays:
        shard = self._cache.shard(self._commits[part])
        axes = shard.manifest.attributes["user_axes"]
        where = self._cache.storage.describe(shard.path)
        for name in names:
            if name not in shard.columns:
                do = "Take the column out of rows.ranges, or retire the part."
                raise InputError(where, f"a column {name!r}", ", ".join(shard.columns), do)
            if axes.get(name) == "position":
                do = "Take the column out of rows.ranges."
                raise InputError(f"{where}, {name}", "one number a sequence", "one a position", do)
        arrays = shard.read_ranges([(name, 0, None) for name in names])
        return dict(zip(names, arrays, strict=True))
