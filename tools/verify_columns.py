"""Every number of a shard: decoded, compared with the part's rollouts, and checked against what
`docs/format.md` promises. Columns are read in blocks, so that memory is bounded whatever the commit
claims."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pyarrow as pa

from stillroom.cache.errors import CorruptError
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import EDGE_OF, FINISH_REASONS, SOURCES, Arrays
from stillroom.cache.shard_format import Reader, Source
from stillroom.tools.verify_scores import check_scores, score_names

BLOCK_ROWS = 16_384
LARGEST = {
    "finish_reason": len(FINISH_REASONS) - 1,
    "source": len(SOURCES) - 1,
    "ends_with_stop": 1,
    "scored": 1,
    "behaviour_logprob": 0,
}
LEAST = {"policy_version_min": -1, "policy_version_max": -1, "prompt_length": 1}
IDS = ("token", "teacher_prompt")

Watch = Callable[[], AbstractContextManager[None]]


def check_columns(source: Source, reader: Reader, table: pa.Table | None, watch: Watch) -> None:
    """Check all columns of a shard.

    Args:
        source: its manifest and commit.
        reader: its columns.
        table: the part's rollouts; None where they are gone or damaged.
        watch: what goes wrong in one of these contexts is one finding.
    """
    columns = _Columns(source, reader)
    with watch():
        columns.check_rows()
    scores = score_names(source.identity)
    own = {} if table is None else part_arrays(table, source.identity.student_extra)
    with watch():
        columns.check_names(own, scores)
    for name in columns.shapes:
        if name in own or name not in scores:
            with watch():
                columns.check_values(name, own.get(name))
    with watch():
        for start, sampled in columns.sampled():
            with watch():
                columns.check_scores(scores, start, sampled)


class _Columns:
    """Columns of one shard, in blocks of rows."""

    def __init__(self, source: Source, reader: Reader) -> None:
        self._commit, self._identity, self._reader = source.commit, source.identity, reader
        self.shapes = source.shapes()

    def check_rows(self) -> None:
        """Edges, lengths and mask must give the row table that the commit holds."""
        sizes = {"token": self._commit.tokens, "position": self._commit.positions}
        starts = {}
        for axis, name in EDGE_OF.items():
            end = sizes.get(axis, self._commit.teacher_prompt_tokens)
            starts[axis] = edges = self._whole(name)
            whole = edges[0] == 0 and edges[-1] == end and not (np.diff(edges) < 0).any()
            _require(whole, name, f"offsets from 0 up to {end}", "others")
        tokens, positions = starts["token"], starts["position"]
        prompt = self._whole("prompt_length")
        stored = np.stack([np.diff(tokens), prompt, np.diff(positions)], axis=1)
        same = np.array_equal(stored, self._commit.row_lengths())
        _require(same, "row lengths", "those of the commit's row table", "others")
        empty = int((stored[:, 1:] < 1).any(axis=1).sum())
        _require(empty == 0, "row lengths", "a prompt and a position each", f"{empty} without")
        same = np.array_equal(self._scored_before(tokens), positions)
        _require(same, "scored", "as many ones as positions in each sequence", "others")
        inside = int((self._scored_before(tokens[:-1] + prompt) - positions[:-1]).sum())
        _require(inside == 0, "scored", "no position in a prompt", f"{inside}")

    def check_names(self, own: Arrays, scores: list[str]) -> None:
        """The shard must have the columns of its rollouts, of the same shapes."""
        expected = {name: array.shape for name, array in own.items()}
        found = {n: shape for n, shape in self.shapes.items() if n in own or n not in scores}
        _require(not own or found == expected, "columns", f"{expected} (rollouts)", f"{found}")

    def check_values(self, name: str, own: np.ndarray | None) -> None:
        """A column that is not the teacher's: within its range, and equal to the rollouts'."""
        vocab_size = self._identity.vocab_size
        least = LEAST.get(name)
        largest = vocab_size - 1 if name in IDS else LARGEST.get(name)
        for start, block in self._blocks(name):
            above = largest is not None and bool((block > largest).any())
            _require(not above, name, f"at most {largest}", "more")
            below = least is not None and bool((block < least).any())
            _require(not below, name, f"at least {least}", "less")
            if own is not None:
                expected = own[start : start + len(block)]
                same = np.array_equal(block, expected, equal_nan=block.dtype.kind == "f")
                _require(same, name, "the values of the part's rollouts", "others")

    def sampled(self) -> Iterator[tuple[int, np.ndarray]]:
        """Ids that were scored: the first position of each run of them, and the ids."""
        position = 0
        for start, scored in self._blocks("scored"):
            [token] = self._reader.read_ranges([("token", start, start + len(scored))])
            ids = token[scored == 1][: self._commit.positions - position]
            if len(ids):
                yield position, ids
            position += len(ids)
        expected = self._commit.positions
        _require(position == expected, "scored", f"{expected} ones", f"{position}")

    def check_scores(self, names: list[str], start: int, sampled: np.ndarray) -> None:
        """The teacher's columns at some positions; see `verify_scores`."""
        stop = start + len(sampled)
        block = self._reader.read_ranges([(name, start, stop) for name in names])
        arrays: Arrays = dict(zip(names, block, strict=True))
        arrays |= {"token": sampled, "scored": np.ones(len(sampled), np.uint16)}
        check_scores(arrays, self._identity, f"positions {start} to {stop - 1}")

    def _blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        rows = self.shapes[name][0]
        for start in range(0, rows, BLOCK_ROWS):
            yield start, self._reader.read_ranges([(name, start, min(start + BLOCK_ROWS, rows))])[0]

    def _whole(self, name: str) -> np.ndarray:
        """A column along sequences."""
        [column] = self._reader.read_ranges([(name, 0, self.shapes[name][0])])
        return column.astype(np.int64)

    def _scored_before(self, points: np.ndarray) -> np.ndarray:
        """How many tokens before each of some points are scored; the points ascend."""
        counted, total = np.zeros(len(points), np.int64), 0
        for start, block in self._blocks("scored"):
            low, high = np.searchsorted(points, [start, start + len(block)])
            until = total + np.concatenate([[0], np.cumsum(block, dtype=np.int64)])
            counted[low:high] = until[points[low:high] - start]
            total = int(until[-1])
        counted[points >= self._commit.tokens] = total
        return counted


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise CorruptError(where, expected, got, "Score the part again.")
