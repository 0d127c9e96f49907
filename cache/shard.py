"""Reading a committed shard, whatever its format: columns by range, or whole sequences."""

from collections.abc import Collection, Iterable

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit, attempt_path
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.identity import Identity
from stillroom.cache.manifest import Manifest
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import BY_NAME, EDGE_OF, Arrays, Axis, column_of
from stillroom.cache.shard_format import Source, shard_format, verify
from stillroom.cache.storage import Storage


class Shard:
    """One committed shard.

    Args:
        storage: the cache's storage.
        commit: its live commit.
        identity: the cache's.
        empty: makes the arrays that are read.

    Raises:
        CorruptError: the manifest is not the one that was committed, or impossible.
    """

    def __init__(
        self, storage: Storage, commit: Commit, identity: Identity, empty: Empty = np.empty
    ) -> None:
        """Read and verify the manifest; no array is read yet."""
        self.commit = commit
        form = shard_format(identity.shard_format)
        folder = attempt_path(commit.part, commit.attempt)
        path = f"{folder}/manifest.json"
        data = storage.get(path, min(commit.stored_bytes, jsonfile.MAX_BYTES))
        where = storage.describe(path)
        verify(data, commit.manifest_hash, where)
        self.manifest = Manifest.from_json(data, where)
        path = f"{folder}/{form.object_name}"
        source = Source(storage, path, commit, identity, self.manifest, empty=empty)
        self.path = source.path
        """The shard's object, below the root."""
        self._where = source.where
        self._shapes = source.shapes()
        self._user_axes: dict[str, Axis] = self.manifest.attributes["user_axes"]
        self._reader = form.open(source)
        self._edges: dict[str, np.ndarray] = {}

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return list(self._shapes)

    @property
    def raw_bytes(self) -> int:
        """Bytes of all columns as plain arrays."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(column_of(name).dtype).itemsize
            for name, shape in self._shapes.items()
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of one column along its own axis.

        Raises:
            CorruptError: bytes are not what was committed; names the object, the column and the
                chunk.
        """
        return self.read_ranges([(name, start, stop)])[0]

    def read_ranges(self, wanted: Iterable[tuple[str, int, int | None]]) -> list[np.ndarray]:
        """Several columns in one request: (name, start, stop) each; stop None is the end."""
        spans = []
        for name, start, stop in wanted:
            if name not in self._shapes:
                do = f"It has {', '.join(self._shapes)}."
                raise MissingError(f"{self._where}", f"a column {name!r}", "none", do)
            rows = self._shapes[name][0]
            last = rows if stop is None else min(stop, rows)
            spans.append((name, min(start, last), last))
        return self._reader.read_ranges(spans)

    def rows(self, start: int, stop: int, columns: Collection[str] | None = None) -> Arrays:
        """Columns of the sequences [start, stop), all unless some are named, and their edges, which
        are rebased to begin at 0."""
        wanted = self.columns if columns is None else columns
        names = [n for n in self.columns if n in wanted and self.axis(n) != "edge"]
        spans = [(n, *self._span(self.axis(n), start, stop)) for n in names]
        arrays = dict(zip(names, self.read_ranges(spans), strict=True))
        axes = {self.axis(n) for n in names}
        for edge in (e for axis, e in EDGE_OF.items() if columns is None or axis in axes):
            own = self._edge(edge)[start : stop + 1]
            arrays[edge] = own - own[0]
        return arrays

    def all_rows(self) -> Arrays:
        """All columns of all sequences."""
        return self.rows(0, self.commit.rows)

    def axis(self, name: str) -> Axis:
        """What a column has one entry for."""
        return self._user_axes.get(name) or BY_NAME[name].axis

    def _span(self, axis: Axis, start: int, stop: int) -> tuple[int, int]:
        if axis == "sequence":
            return start, stop
        starts = self._edge(EDGE_OF[axis])
        return int(starts[start]), int(starts[stop])

    def _edge(self, name: str) -> np.ndarray:
        """Offsets of an edge column: from the commit's row table, but for teacher prompts."""
        if name not in self._edges:
            if name == "teacher_prompt_start" and self.commit.teacher_prompt_tokens:
                self._edges[name] = self._read_edges(name)
            else:
                self._edges[name] = self._known_edges(name)
        return self._edges[name]

    def _known_edges(self, name: str) -> np.ndarray:
        edges = np.zeros(self.commit.rows + 1, np.int64)
        column = {"sequence_start": 0, "position_start": 2}.get(name)
        if column is not None:
            np.cumsum(self.commit.row_lengths()[:, column], out=edges[1:])
        return edges

    def _read_edges(self, name: str) -> np.ndarray:
        edges, end = self.read(name).astype(np.int64), self.commit.teacher_prompt_tokens
        if edges[0] != 0 or edges[-1] != end or (np.diff(edges) < 0).any():
            where, do = f"{self._where}, {name}", "Score the part again."
            raise CorruptError(where, f"offsets from 0 up to {end}", "others", do)
        return edges
