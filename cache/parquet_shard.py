"""Reading a Parquet shard by the ranges in its manifest; see `parquet_layout` for what is stored.

Neither the file's own metadata nor pyarrow's reader is used: what a column holds is known from the
commit, and its pages are decoded here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stillroom.cache.errors import CorruptError
from stillroom.cache.lists import edges
from stillroom.cache.parquet_column import Rows, Values, decode_column
from stillroom.cache.parquet_layout import (
    GROUP_TOKENS,
    MAGIC,
    OBJECT_NAME,
    Field,
    fields_of,
    group_positions,
)
from stillroom.cache.schema import EDGE_OF, Arrays, Axis, column_of
from stillroom.cache.shard_format import Encoded, Source

Span = tuple[str, int, int]
Place = tuple[str, int]
"""A column and a row group."""
DO = "Score the part again."
COUNTED = "topk_logprob"
"""The column whose inner lists say how many entries are used."""


class ParquetFormat:
    """One Parquet file, one row a sequence; see `shard_format.ShardFormat`."""

    object_name = OBJECT_NAME

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode every column into one object."""
        from stillroom.cache.parquet_writer import encode_parquet

        return encode_parquet(arrays, attributes)

    def open(self, source: Source) -> "ParquetReader":
        """Check a manifest and bind to it."""
        return ParquetReader(source)


class ParquetReader:
    """Columns of one Parquet shard.

    Args:
        source: its object and manifest.

    Raises:
        CorruptError: the manifest is impossible for its commit.
    """

    def __init__(self, source: Source) -> None:
        """Check shapes, dtypes, row groups, and that the chunks lie end to end."""
        self._source = source
        identity, manifest = source.identity, source.manifest
        self._fields = {
            field.name: field
            for field in fields_of(manifest.attributes["user_axes"], extra=identity.extra > 0)
        }
        self._shapes = source.shapes()
        stored = {name: self._shapes[name] for name in self._fields}
        manifest.check_shapes(stored, source.where)
        table = source.commit.row_lengths().astype(np.int64)
        self._length: dict[Axis, np.ndarray] = {
            "sequence": np.ones(len(table), np.int64),
            "token": table[:, 0],
            "position": table[:, 2],
        }
        self._edges = {axis: edges(length) for axis, length in self._length.items()}
        self._groups = self._check_groups()
        self._check_chunks()

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """Rows [start, stop) of columns; see `shard_format.Reader`."""
        if any(name.startswith("teacher_prompt") for name, _, _ in wanted):
            self._load_teacher_edges()
        needed: dict[Place, tuple[int, int]] = {}
        for name, start, stop in wanted:
            for field, group, first, last in self._rows_of(name, start, stop):
                low, high = needed.get((field.name, group), (first, last))
                needed[field.name, group] = min(low, first), max(high, last)
        found = self._fetch(needed)
        self._check_counts(found)
        return [self._assemble(span, found) for span in wanted]

    def _check_groups(self) -> np.ndarray:
        """(groups + 1,) first sequence of each row group, and the end."""
        groups, rows = self._source.manifest.row_groups, self._source.commit.rows
        if min(groups, default=1) < 1 or sum(groups) != rows:
            raise self._corrupt("row groups", f"{rows} sequences", f"{groups[:9]} and so on")
        bounds = edges(np.array(groups, np.int64))
        positions, tokens = (np.diff(self._edges[axis][bounds]) for axis in ("position", "token"))
        limit = group_positions(self._source.identity.topk)
        too_large = (np.array(groups) > 1) & ((positions > limit) | (tokens > GROUP_TOKENS))
        if too_large.any():
            expected = f"at most {limit} positions and {GROUP_TOKENS} tokens in several sequences"
            raise self._corrupt("row groups", expected, "more")
        return bounds

    def _check_chunks(self) -> None:
        manifest = self._source.manifest
        end = len(MAGIC)
        entries = [manifest.arrays[name] for name in self._fields]
        for field, entry in zip(self._fields.values(), entries, strict=True):
            stated, count = (entry.dtype, len(entry.chunks)), len(self._groups) - 1
            if stated != (field.dtype, count):
                raise self._corrupt(field.name, f"{field.dtype} in {count} chunks", f"{stated}")
        for chunk in (entry.chunks[i] for i in range(len(self._groups) - 1) for entry in entries):
            if chunk.offset != end:
                raise self._corrupt("chunks", f"one at {end}", f"one at {chunk.offset}")
            end += chunk.length

    def _load_teacher_edges(self) -> None:
        if "teacher_token" in self._edges:
            return
        source, commit = self._source, self._source.commit
        length = np.zeros(commit.rows, np.int64)
        if commit.teacher_prompt_tokens:
            rows = enumerate(source.manifest.row_groups)
            spans = {("teacher_prompt", group): (0, count) for group, count in rows}
            parts = self._fetch(spans)
            length = np.concatenate([parts[key][1].length for key in spans])
            if length.sum() != commit.teacher_prompt_tokens:
                expected = f"{commit.teacher_prompt_tokens} tokens"
                raise self._corrupt("teacher_prompt", expected, f"{length.sum()}")
        self._length["teacher_token"] = length
        self._edges["teacher_token"] = edges(length)  # last: other threads look for it

    def _rows_of(self, name: str, start: int, stop: int) -> Iterator[tuple[Field, int, int, int]]:
        """Field, row group, and sequences within it that hold rows [start, stop) of a column."""
        if stop <= start or name in EDGE_OF.values():
            return
        field = self._field(name)
        edge = self._edges[field.axis]
        start = int(np.searchsorted(edge, start, "right")) - 1
        stop = int(np.searchsorted(edge, stop, "left"))
        group = int(np.searchsorted(self._groups, start, "right")) - 1
        while start < stop:
            first, end = self._groups[group : group + 2].tolist()
            yield field, group, start - first, min(stop, end) - first
            start, group = end, group + 1

    def _field(self, name: str) -> Field:
        return self._fields[COUNTED if name == "topk_count" else name]

    def _fetch(self, needed: Mapping[Place, tuple[int, int]]) -> dict[Place, tuple[int, Values]]:
        """Sequences of columns, verified and decoded, and where they begin along the column."""
        arrays = self._source.manifest.arrays
        chunks = [
            (f"{name}, row group {group}", arrays[name].chunks[group]) for name, group in needed
        ]
        blobs = self._source.fetch(chunks)
        found = {}
        for ((name, group), (start, stop)), blob in zip(needed.items(), blobs, strict=True):
            field = self._fields[name]
            rows = self._group_rows(field, group)
            try:
                values = decode_column(field, blob, rows, start, stop)
            except ValueError as error:
                raise self._corrupt(
                    f"{name}, row group {group}", "pages of the column", str(error)
                ) from error
            row = int(self._groups[group]) + start
            begin = self._edges[field.axis][row] if field.axis in self._edges else 0
            found[name, group] = int(begin), values
        return found

    def _group_rows(self, field: Field, group: int) -> Rows:
        start, stop = self._groups[group : group + 2].tolist()
        length = self._length.get(field.axis)
        identity = self._source.identity
        return Rows(
            positions=self._length["position"][start:stop],
            length=None if length is None else length[start:stop],
            limit=self._source.commit.teacher_prompt_tokens,
            width={"": 1, "K": identity.topk, "M": identity.extra}[field.width],
            topk=identity.topk,
        )

    def _check_counts(self, found: Mapping[Place, tuple[int, Values]]) -> None:
        """Where ids and their log probabilities both came, there are equally many."""
        for group in {group for name, group in found if name == COUNTED}:
            if ("topk_id", group) not in found:
                continue
            begins, values = zip(
                *(found[name, group] for name in ("topk_id", COUNTED)), strict=True
            )
            counts = [v.count[max(begins) - b :] for b, v in zip(begins, values, strict=True)]
            shared = min(len(count) for count in counts)
            if not np.array_equal(counts[0][:shared], counts[1][:shared]):
                where = f"topk_id, row group {group}"
                raise self._corrupt(where, f"as many ids as {COUNTED}", "others")

    def _assemble(self, span: Span, found: Mapping[Place, tuple[int, Values]]) -> np.ndarray:
        name, start, stop = span
        for axis, edge in EDGE_OF.items():
            if name == edge:
                return self._edges[axis][start:stop].astype(np.uint64)
        shape = (max(0, stop - start), *self._shapes[name][1:])
        out = self._source.empty(shape, column_of(name).dtype)
        for field, group, _, _ in self._rows_of(name, start, stop):
            begin, values = found[field.name, group]
            own = values.count if name == "topk_count" else values.value
            low, high = max(start, begin), min(stop, begin + len(own))
            out[low - start : high - start] = own[low - begin : high - begin]
        return out

    def _corrupt(self, what: str, expected: str, got: str) -> CorruptError:
        return CorruptError(f"{self._source.where}, {what}", expected, got, DO)
