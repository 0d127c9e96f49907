"""Reading a Zarr shard by the ranges in its manifest; see `zarr_layout` for what is stored."""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from stillroom.cache.codec import decode_chunk
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import ArrayEntry
from stillroom.cache.schema import BY_NAME, UNUSED_ID, Arrays
from stillroom.cache.shard_format import Encoded, Source
from stillroom.cache.zarr_entries import unpack_entries
from stillroom.cache.zarr_id_groups import MAX_LOOKUP, IdLookup
from stillroom.cache.zarr_layout import CHUNK_ROWS, OBJECT_NAME, STORED_IDS, chunks_of

Span = tuple[str, int, int]
UNUSED = {"topk_id": UNUSED_ID, "topk_logprob": -np.inf}
"""Columns of K entries a position, and what an unused one holds."""


class ZarrFormat:
    """One uncompressed ZIP of a Zarr v3 group; see `shard_format.ShardFormat`."""

    object_name = OBJECT_NAME

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode every column into one object."""
        from stillroom.cache.zarr_shard import encode_zarr

        return encode_zarr(arrays, attributes)

    def open(self, source: Source) -> "ZarrReader":
        """Check a manifest and bind to it."""
        return ZarrReader(source)


class ZarrReader:
    """Columns of one Zarr shard.

    Args:
        source: its object and manifest.

    Raises:
        CorruptError: the manifest is impossible for its commit.
    """

    def __init__(self, source: Source) -> None:
        """Check shapes, dtypes and counts of chunks."""
        self._source = source
        self._arrays = source.manifest.arrays
        self._topk = source.identity.topk
        self._is_packed, self._groups, self._width = _own_attributes(source)
        self._lookup: IdLookup | None = None
        self._starts: np.ndarray | None = None
        source.manifest.check_shapes(self._stored_shapes(), source.where)
        for name, entry in self._arrays.items():
            self._check_entry(name, entry)
        self._check_lists(self._arrays["topk_list"].shape[0])

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """Rows [start, stop) of columns; see `shard_format.Reader`."""
        if self._is_packed and any(s[0] in UNUSED and s[2] > s[1] for s in wanted):
            self._read_starts()
        plain = [span for span in wanted if span[0] not in UNUSED]
        entries = [span for span in wanted if span[0] in UNUSED]
        ids = [span for span in entries if span[0] == "topk_id"]
        plain += [("topk_group", start, stop) for _, start, stop in ids]
        first = bool(ids) and self._lookup is None  # asked once: threads share a reader
        if first:
            plain.append(("topk_list", 0, self._arrays["topk_list"].shape[0]))
        stored = [self._stored_span(span) for span in entries]
        blobs = iter(self._fetch([*plain, *stored]))
        found = [self._decode(span, blobs) for span in plain]
        if first:
            self._lookup = IdLookup(found.pop(), self._groups, self._width)
        groups = iter(found[len(found) - len(ids) :])
        named = iter(found)
        unpacked = iter(
            [
                self._entries(span, rows, blobs, next(groups) if span[0] == "topk_id" else None)
                for span, rows in zip(entries, stored, strict=True)
            ]
        )
        return [next(unpacked if name in UNUSED else named) for name, _, _ in wanted]

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that follow from the commit; those of used entries and lists are the manifest's,
        within their bounds."""
        shapes = self._source.shapes()
        positions, topk = shapes.pop("topk_id")
        listed, packed = (self._arrays.get(name) for name in ("topk_list", "topk_code"))
        rows = positions
        if self._is_packed and packed and -(-positions // topk) <= packed.shape[0] <= positions:
            rows = packed.shape[0]
        return shapes | {
            "topk_code": (rows, topk),
            "topk_logprob": (rows, topk),
            "topk_group": (positions,),
            "topk_list": (listed.shape[0] if listed else 0,),
        }

    def _check_entry(self, name: str, entry: ArrayEntry) -> None:
        dtype = STORED_IDS.get(name) or (BY_NAME[name].dtype if name in BY_NAME else "float32")
        expected = dtype, chunks_of(entry.shape[0])
        found = entry.dtype, len(entry.chunks)
        if found != expected:
            self._refuse(name, f"{expected[0]} in {expected[1]} chunks", f"{found}")

    def _check_lists(self, length: int) -> None:
        distinct = length - self._groups * self._width
        lookup = self._groups * (self._width + distinct)
        most = self._source.identity.vocab_size + 1
        if not 0 <= distinct <= most or lookup > MAX_LOOKUP:
            got = f"{self._groups} of {self._width} in {length}"
            self._refuse("topk_list", f"lists of at most {most} ids", got)

    def _read_starts(self) -> None:
        """First entry of each position, where they do not all use K."""
        if self._starts is not None:
            return
        span = ("topk_count", 0, self._arrays["topk_count"].shape[0])
        count = self._decode(span, iter(self._fetch([span]))).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(count)])
        rows = self._arrays["topk_code"].shape[0]
        if count.max(initial=0) > self._topk or -(-int(starts[-1]) // self._topk) != rows:
            got = f"{starts[-1]} entries, at most {count.max(initial=0)} a position"
            self._refuse("topk_count", f"the entries of {rows} rows of {self._topk}", got)
        self._starts = starts

    def _stored_span(self, span: Span) -> Span:
        """Where a span's entries are stored."""
        name, start, stop = span
        stored = "topk_code" if name == "topk_id" else name
        if self._starts is None:
            return stored, start, stop
        first, last = int(self._starts[start]), int(self._starts[stop])
        return stored, first // self._topk, max(-(-last // self._topk), first // self._topk)

    def _entries(
        self, span: Span, stored: Span, blobs: Iterator[bytes], group: np.ndarray | None
    ) -> np.ndarray:
        """K entries a position; with their groups, of ids instead of codes."""
        name, start, stop = span
        if self._starts is None:
            return self._decode(stored, blobs, None if group is None else group[:, None])
        count = np.diff(self._starts[start : stop + 1])
        skipped = int(self._starts[start]) - stored[1] * self._topk
        used = slice(skipped, skipped + int(count.sum()))
        if group is not None:
            by_entry = np.zeros((stored[2] - stored[1]) * self._topk, group.dtype)
            by_entry[used] = np.repeat(group, count)
            group = by_entry.reshape(-1, self._topk)
        packed = self._decode(stored, blobs, group).reshape(-1)
        return unpack_entries(packed[used], count, self._topk, UNUSED[name])

    def _fetch(self, spans: Sequence[Span]) -> list[bytes]:
        chunks = []
        for name, start, stop in spans:
            first, last = _chunk_span(start, stop)
            for i in range(first, last):
                chunks.append((f"{name}, chunk {i}", self._arrays[name].chunks[i]))
        return self._source.fetch(chunks)

    def _decode(
        self, span: Span, blobs: Iterator[bytes], group: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows of one stored array; with groups, (rows, 1 or K), of ids instead of codes."""
        name, start, stop = span
        entry = self._arrays[name]
        empty = self._source.empty
        out = empty((stop - start, *entry.shape[1:]), entry.dtype)
        scratch: np.ndarray | None = None
        first, last = _chunk_span(start, stop)
        for i in range(first, last):
            where = f"{self._source.where}, {name}, chunk {i}"
            low, high = max(start, i * CHUNK_ROWS), min(stop, (i + 1) * CHUNK_ROWS)
            target = out[low - start : high - start]
            if high - low == CHUNK_ROWS and group is None:
                decode_chunk(next(blobs), target, where)
                continue
            if scratch is None:
                scratch = empty((CHUNK_ROWS, *entry.shape[1:]), entry.dtype)
                index = empty(scratch.shape if group is not None else (0,), np.int64)
            # as far as rows are wanted; the last chunk to its end, so that its count is checked
            is_last = (i + 1) * CHUNK_ROWS >= entry.shape[0]
            needed = scratch if is_last else scratch[: high - i * CHUNK_ROWS]
            decode_chunk(next(blobs), needed, where, scratch.size)
            rows = scratch[low - i * CHUNK_ROWS : high - i * CHUNK_ROWS]
            if group is None:
                target[...] = rows
            else:
                own = group[low - start : high - start]
                self._look_up(rows, own, target, index[: len(rows)], where)
        return out

    def _look_up(
        self, code: np.ndarray, group: np.ndarray, out: np.ndarray, index: np.ndarray, where: str
    ) -> None:
        """Ids of codes; see `IdLookup.look_up`."""
        lookup = self._lookup
        assert lookup is not None
        if not lookup.look_up(code, group, out, index):
            expected = f"codes below {lookup.codes} and groups below {lookup.groups}"
            raise CorruptError(where, expected, "larger ones", "Score the part again.")

    def _refuse(self, name: str, expected: str, got: str) -> NoReturn:
        where = f"{self._source.where}, {name}"
        raise CorruptError(where, expected, got, "Score the part again.")


def _chunk_span(start: int, stop: int) -> tuple[int, int]:
    return (start // CHUNK_ROWS, chunks_of(stop)) if stop > start else (0, 0)


def _own_attributes(source: Source) -> tuple[bool, int, int]:
    """Whether only used entries are stored, and G and W of the lists of ids."""
    attributes = source.manifest.attributes
    packed = attributes.get("entries_packed")
    groups, width = attributes.get("id_groups"), attributes.get("id_group_width")
    sizes = [n for n in (groups, width) if type(n) is int and 0 <= n <= MAX_LOOKUP]
    if len(sizes) != 2 or not groups or not isinstance(packed, bool):
        expected, got = "how ids and entries are stored", f"{(groups, width)} and {packed}"
        raise CorruptError(source.where, expected, got, "Score the part again.")
    return packed, sizes[0], sizes[1]
