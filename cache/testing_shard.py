"""A shard that a format encoded into memory, where a test can damage it or forge its manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.check_arrays import check_arrays
from stillroom.cache.commits import Commit, attempt_path, encode_row_table
from stillroom.cache.errors import CorruptError
from stillroom.cache.example_shards import USER_AXES, random_shard, strange_floats
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from stillroom.cache.ranges import too_large, wrong_size
from stillroom.cache.schema import FORMAT_VERSION, Arrays
from stillroom.cache.shard_format import Encoded, Reader, ShardFormat, Source
from stillroom.cache.storage import Storage

PART = "v000000-0000000000000000"
ATTEMPT = "0" * 32
SMALL: dict[str, Any] = {
    "positions": 700,
    "sequences": 12,
    "topk": 6,
    "vocab_size": 90,
    "extra": 2,
    "mass": True,
    "user_columns": True,
}
"""Settings of `random_shard` that give every kind of column."""


class OneObject(Storage):
    """One object in memory, whose reads are written down.

    Args:
        data: its bytes; replace them to damage it.
    """

    def __init__(self, data: bytes) -> None:
        """Hold the bytes."""
        super().__init__("memory://contract")
        self.data = data
        self.reads: list[list[tuple[int, int]]] = []
        """Ranges (start, length) of every call."""

    def size(self, path: str) -> int:
        """Bytes of the object."""
        return len(self.data)

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """The whole object."""
        if max_bytes is not None and len(self.data) > max_bytes:
            raise too_large(self.describe(path), max_bytes, len(self.data))
        self.reads.append([(0, len(self.data))])
        return self.data

    def get_ranges(
        self, path: str, starts: Sequence[int], lengths: Sequence[int], size: int | None = None
    ) -> list[bytes]:
        """Ranges of it, cut off at its end."""
        if size is not None and size != len(self.data):
            raise wrong_size(self.describe(path), size, len(self.data))
        ranges = list(zip(starts, lengths, strict=True))
        if ranges:
            self.reads.append(ranges)
        return [self.data[start : start + length] for start, length in ranges]


@dataclass(slots=True)
class Stored:
    """A shard that a format encoded, held in memory."""

    form: ShardFormat
    arrays: Arrays
    """What was encoded."""
    encoded: Encoded
    storage: OneObject
    source: Source
    """The object in `storage`, and what a reader is told of it."""

    def open(self) -> Reader:
        """Open it as it stands now; the manifest passes through its JSON."""
        manifest = Manifest.from_json(self.source.manifest.to_json(), "manifest.json")
        return self.form.open(replace(self.source, manifest=manifest))

    def read_all(self) -> Arrays:
        """Every column, whole, in one read of a new reader."""
        shapes = self.source.shapes()
        spans = [(name, 0, shape[0]) for name, shape in shapes.items()]
        return dict(zip(shapes, self.open().read_ranges(spans), strict=True))

    def changed(self, **fields: Any) -> "Stored":
        """The object as it stands now, under a manifest with other fields."""
        storage = OneObject(self.storage.data)
        manifest = replace(self.source.manifest, **fields)
        source = replace(self.source, storage=storage, manifest=manifest)
        return replace(self, storage=storage, source=source)

    def forged(self, name: str, number: int, data: bytes) -> "Stored":
        """Other bytes as a chunk, with the hash that a hostile writer would give them: in its place
        if they fit, else behind the object."""
        chunk = next(c for n, i, c in self.chunks() if (n, i) == (name, number))
        whole = bytearray(self.storage.data)
        at = chunk.offset if len(data) <= chunk.length else len(whole)
        whole[at : at + len(data)] = data
        forged = Chunk(at, len(data), jsonfile.digest(data))
        out = self.changed(size=len(whole)).with_chunk(name, number, forged)
        out.storage.data = bytes(whole)
        return out

    def with_chunk(self, name: str, number: int, chunk: Chunk) -> "Stored":
        """Another range as a chunk of an array."""
        entry = self.source.manifest.arrays[name]
        chunks = (*entry.chunks[:number], chunk, *entry.chunks[number + 1 :])
        return self.with_entry(name, replace(entry, chunks=chunks))

    def with_entry(self, name: str, entry: ArrayEntry) -> "Stored":
        """Another entry of an array."""
        return self.changed(arrays=self.source.manifest.arrays | {name: entry})

    def chunks(self) -> list[tuple[str, int, Chunk]]:
        """Array, number and range of every chunk."""
        arrays = self.source.manifest.arrays.items()
        return [(n, i, c) for n, entry in arrays for i, c in enumerate(entry.chunks)]


def stored_shard(form: ShardFormat, arrays: Arrays, *, topk: int, vocab_size: int) -> Stored:
    """Encode a shard into memory, as the only one of a cache that fits it."""
    extra = arrays["extra_id"].shape[1] if "extra_id" in arrays else 0
    check_arrays(arrays, topk, extra)
    identity = make_identity(topk, vocab_size, extra)
    encoded = form.encode(arrays, make_attributes(arrays, identity))
    manifest = Manifest(
        part=PART,
        attempt=ATTEMPT,
        identity=identity.digest(),
        size=len(encoded.data),
        hash=jsonfile.digest(encoded.data),
        arrays=encoded.arrays,
        row_groups=encoded.row_groups,
        attributes=encoded.attributes,
    )
    path = f"{attempt_path(PART, ATTEMPT)}/{form.object_name}"
    commit = _commit(arrays, manifest)
    storage = OneObject(encoded.data)
    source = Source(storage, path, commit, identity, manifest)
    return Stored(form, arrays, encoded, storage, source)


def random_stored(
    form: ShardFormat, seed: int = 0, *, strange: bool = True, **settings: Any
) -> Stored:
    """A stored shard of random values.

    Args:
        form: its format.
        seed: equal seeds give equal shards.
        strange: whether its floats are of any bits, or else scores as a teacher gives them.
        settings: as in `random_shard`; those not given are `SMALL`.
    """
    settings = SMALL | settings
    arrays = random_shard(seed, **settings)
    if strange:
        arrays = strange_floats(arrays, seed)
    return stored_shard(form, arrays, topk=settings["topk"], vocab_size=settings["vocab_size"])


def expect(condition: bool, what: str) -> None:
    """Fail unless a condition holds, also where assertions are switched off."""
    if not condition:
        raise AssertionError(what)


def expect_same(found: Arrays, expected: Arrays, what: str) -> None:
    """Fail unless columns are equal in name, dtype, shape and every bit."""
    expect(found.keys() == expected.keys(), f"{what}: {sorted(found)}, not {sorted(expected)}")
    for name, array in expected.items():
        own = found[name]
        stated, wanted = f"{own.dtype}{own.shape}", f"{array.dtype}{array.shape}"
        expect(stated == wanted, f"{what}, {name}: {stated}, not {wanted}")
        expect(own.tobytes() == array.tobytes(), f"{what}, {name}: other numbers")


def expect_corrupt(stored: Stored, what: str, *, names_object: bool = False) -> None:
    """Fail unless a shard is refused, when it is opened or when it is read."""
    found = _read_or_refuse(stored, what)
    expect(isinstance(found, CorruptError), f"{what}: was read")
    if names_object and isinstance(found, CorruptError):
        expect(stored.source.where in found.where, f"{what}: the error names {found.where}")


def expect_sound(stored: Stored, what: str) -> None:
    """Fail unless a shard is refused, or gives arrays of the dtypes and shapes that were encoded,
    whatever numbers are in them."""
    found = _read_or_refuse(stored, what)
    if isinstance(found, CorruptError):
        return
    for name, array in stored.arrays.items():
        alike = (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        expect(alike, f"{what}: {name} is {found[name].dtype}{found[name].shape}")


def expect_true(stored: Stored, what: str) -> None:
    """Fail unless a shard is refused, or gives exactly what was encoded."""
    found = _read_or_refuse(stored, what)
    if not isinstance(found, CorruptError):
        expect_same(found, stored.arrays, what)


def _read_or_refuse(stored: Stored, what: str) -> Arrays | CorruptError:
    try:
        return stored.read_all()
    except CorruptError as error:
        return error
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error


def make_identity(topk: int, vocab_size: int, extra: int) -> Identity:
    teacher = TeacherId(
        name="contract", revision=None, weight_format="F32", compute_dtype="float32", fingerprint=""
    )
    return Identity(
        teacher=teacher,
        tokenizer_fingerprint="",
        vocab_size=vocab_size,
        logit_width=vocab_size,
        topk=topk,
        extra=extra,
        extra_kind="student" if extra else "none",
    )


def make_attributes(arrays: Arrays, identity: Identity) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "part": PART,
        "policy_version": 0,
        "unit": "0" * 16,
        "sampler": {"temperature": 1.0, "top_p": 0.9},
        "identity": identity.digest(),
        "temperature": 1.0,
        "user_axes": {name: axis for name, axis in USER_AXES.items() if name in arrays},
    }


def _commit(arrays: Arrays, manifest: Manifest) -> Commit:
    lengths = [np.diff(arrays[edge]) for edge in ("sequence_start", "position_start")]
    return Commit(
        part=PART,
        n=0,
        attempt=ATTEMPT,
        identity=manifest.identity,
        manifest_hash=jsonfile.digest(manifest.to_json()),
        rollouts_hash="0" * 32,
        rows=len(arrays["prompt_length"]),
        positions=len(arrays["sampled_logprob"]),
        tokens=len(arrays["token"]),
        teacher_prompt_tokens=len(arrays["teacher_prompt"]),
        stored_bytes=manifest.size,
        teacher_s=0.0,
        scorer={},
        row_table=encode_row_table(lengths[0], arrays["prompt_length"], lengths[1]),
    )
