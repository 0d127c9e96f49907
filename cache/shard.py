"""Reading a committed shard: ranges from the manifest, verified before they are decoded. Needs no
zarr."""

from collections.abc import Iterable

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.codec import decode_chunk
from stillroom.cache.commits import Commit, attempt_path
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import CHUNK_ROWS, OBJECT_NAME, Manifest, chunk_numbers
from stillroom.cache.schema import BY_NAME, EDGE_OF, Arrays, Axis, expected_shapes
from stillroom.cache.storage import Storage


class Shard:
    """One committed shard.

    Args:
        storage: the cache's storage.
        commit: its live commit.
        topk: K of the cache.
        extra: M of the cache.

    Raises:
        CorruptError: the manifest is not the one that was committed, or impossible.
    """

    def __init__(self, storage: Storage, commit: Commit, topk: int, extra: int) -> None:
        """Read and verify the manifest; no array is read yet."""
        self.commit = commit
        self._storage = storage
        self._object = f"{attempt_path(commit.part, commit.attempt)}/{OBJECT_NAME}"
        path = f"{attempt_path(commit.part, commit.attempt)}/manifest.json"
        data = storage.get(path)
        where = storage.describe(path)
        _verify(data, commit.manifest_hash, where)
        self.manifest = Manifest.from_json(data, where)
        sizes = {
            "position": commit.positions,
            "token": commit.tokens,
            "sequence": commit.rows,
            "edge": commit.rows + 1,
            "teacher_token": commit.teacher_prompt_tokens,
        }
        self._user_axes: dict[str, Axis] = self.manifest.attributes["user_axes"]
        user = {name: (sizes[axis],) for name, axis in self._user_axes.items()}
        self.manifest.check_shapes(expected_shapes(sizes, topk, extra) | user, where)
        self._edges: dict[str, np.ndarray] = {}

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self.manifest.arrays)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of one column along its own axis.

        Raises:
            CorruptError: bytes are not what was committed; names the object, the column and the
                chunk.
        """
        return self.read_ranges([(name, start, stop)])[0]

    def read_ranges(self, wanted: Iterable[tuple[str, int, int | None]]) -> list[np.ndarray]:
        """Several columns in one request: (name, start, stop) each."""
        spans = []
        for name, start, stop in wanted:
            entry = self.manifest.arrays[name]
            spans.append(
                (name, start, min(entry.shape[0] if stop is None else stop, entry.shape[0]))
            )
        chunks = [
            (name, i)
            for name, start, stop in spans
            for i in range(
                start // CHUNK_ROWS, -(-stop // CHUNK_ROWS) if stop > start else start // CHUNK_ROWS
            )
        ]
        decoded = iter(self._fetch(chunks))
        out = []
        for name, start, stop in spans:
            entry = self.manifest.arrays[name]
            count = len(range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS))) if stop > start else 0
            empty = np.empty((0, *entry.shape[1:]), entry.dtype)
            rows = np.concatenate([empty, *(next(decoded) for _ in range(count))])
            first = start // CHUNK_ROWS * CHUNK_ROWS
            out.append(rows[start - first : stop - first])
        return out

    def rows(self, start: int, stop: int) -> Arrays:
        """All columns of the sequences [start, stop); edges are rebased to begin at 0."""
        names = [n for n in self.columns if self._axis(n) != "edge"]
        spans = [(n, *self._span(self._axis(n), start, stop)) for n in names]
        arrays = dict(zip(names, self.read_ranges(spans), strict=True))
        for edge in EDGE_OF.values():
            own = self._edge(edge)[start : stop + 1]
            arrays[edge] = own - own[0]
        return arrays

    def all_rows(self) -> Arrays:
        """All columns of all sequences."""
        return self.rows(0, self.commit.rows)

    def _axis(self, name: str) -> Axis:
        return self._user_axes.get(name) or BY_NAME[name].axis

    def _span(self, axis: Axis, start: int, stop: int) -> tuple[int, int]:
        if axis == "sequence":
            return start, stop
        starts = self._edge(EDGE_OF[axis])
        return int(starts[start]), int(starts[stop])

    def _edge(self, name: str) -> np.ndarray:
        if name not in self._edges:
            edges = self.read(name).astype(np.int64)
            total = {"sequence_start": self.commit.tokens, "position_start": self.commit.positions}
            end = total.get(name, self.commit.teacher_prompt_tokens)
            if edges[0] != 0 or edges[-1] != end or (np.diff(edges) < 0).any():
                where = f"{self._storage.describe(self._object)}, {name}"
                raise CorruptError(
                    where, f"offsets from 0 up to {end}", "others", "Score the part again."
                )
            self._edges[name] = edges
        return self._edges[name]

    def _fetch(self, wanted: list[tuple[str, int]]) -> list[np.ndarray]:
        entries = [self.manifest.arrays[name].chunks[i] for name, i in wanted]
        ranges = [(c.offset, c.length) for c in entries]
        blobs = self._storage.get_ranges(
            self._object, [r[0] for r in ranges], [r[1] for r in ranges]
        )
        out = []
        for (name, i), chunk, blob in zip(wanted, entries, blobs, strict=True):
            where = f"{self._storage.describe(self._object)}, {name}, chunk {i}"
            _verify(blob, chunk.hash, where)
            entry = self.manifest.arrays[name]
            numbers = decode_chunk(blob, np.dtype(entry.dtype), chunk_numbers(entry.shape), where)
            out.append(numbers.reshape(CHUNK_ROWS, *entry.shape[1:]))
        return out


def _verify(data: bytes, expected: str, where: str) -> None:
    found = jsonfile.digest(data)
    if found != expected:
        do = "It was damaged after its commit: restore it, or run 'stillroom score --again PART'."
        raise CorruptError(where, f"bytes with hash {expected}", f"{found} ({len(data)} bytes)", do)
