"""`stillroom bench score`: whether the score job's memory stays flat, over as many made-up
positions as one asks for."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from stillroom.cache.fill_rollouts import fill_rollouts, name_rollouts
from stillroom.cache.part import PartMeta
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec
from stillroom.tools.bench_data import Sample, made_up

PARTS = 40
FIRST = 0.1
"""Of the positions, the share in which memory may grow."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Resident memory of one process that scores."""

    positions: int
    parts: int
    topk: int
    first_mb: float
    """The most in the first tenth, MiB."""
    later_mb: float
    """The most after that."""

    @property
    def growth_mb(self) -> float:
        """MiB."""
        return self.later_mb - self.first_mb


def measure_memory(positions: int, topk: int) -> Memory:
    """Score made-up positions part by part as the job does, with a teacher that has the scores at
    hand; to be called in a process of its own."""
    sample = made_up(math.ceil(positions / PARTS), topk)
    teacher = _AtHand(sample, positions)
    with TemporaryDirectory() as folder:
        cache = Cache.create(Path(folder), sample.identity)
        table = _rollouts(sample)
        for number in range(PARTS):
            cache.add_part(table, _meta(sample, number))
        score(cache, teacher, check_teacher=False)
    return Memory(
        positions=teacher.positions,
        parts=PARTS,
        topk=topk,
        first_mb=teacher.first_bytes / 2**20,
        later_mb=teacher.later_bytes / 2**20,
    )


@dataclass(slots=True)
class _AtHand:
    """A teacher that has scored the rows of a sample before, and looks at memory at each row."""

    sample: Sample
    expected: int
    """Positions in all."""
    numeric_class: str = "at-hand"
    positions: int = 0
    first_bytes: int = 0
    later_bytes: int = 0
    _edges: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._edges = self.sample.arrays["position_start"].astype(int).tolist()

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Copies of the sample's scores."""
        arrays = self.sample.arrays
        for index, row in enumerate(rows):
            span = slice(self._edges[index], self._edges[index + 1])
            assert len(row.targets) == span.stop - span.start
            self._look(len(row.targets))
            names = ("topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob")
            yield index, RowScores(*(arrays[name][span].copy() for name in names))

    def _look(self, positions: int) -> None:
        self.positions += positions
        size = PAGE_BYTES * int(Path("/proc/self/statm").read_text().split()[1])
        if self.positions <= FIRST * self.expected:
            self.first_bytes = max(self.first_bytes, size)
        else:
            self.later_bytes = max(self.later_bytes, size)


def _rollouts(sample: Sample) -> pa.Table:
    arrays = sample.arrays
    starts, prompts = (arrays[n].astype(int) for n in ("sequence_start", "prompt_length"))
    middles = starts[:-1] + prompts
    rows = [
        {"prompt": arrays["token"][start:middle], "completion": arrays["token"][middle:stop]}
        for start, middle, stop in zip(starts[:-1], middles, starts[1:], strict=True)
    ]
    kept = pa.schema([PART_SCHEMA.field(name) for name in ("prompt", "completion")])
    table = fill_rollouts(pa.Table.from_pylist(rows, kept), 0)
    return name_rollouts(table, f"{0:016x}")


def _meta(sample: Sample, number: int) -> PartMeta:
    return PartMeta(
        policy_version=0,
        unit=f"{number:016x}",
        tokenizer_fingerprint=sample.identity.tokenizer_fingerprint,
        vocab_size=sample.identity.vocab_size,
        sampler={"temperature": 1.0},
    )
