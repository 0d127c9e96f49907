"""The part of a shard format's contract that is about bytes and manifests which are not those that
were written, by accident or by design."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from stillroom.cache.manifest import ArrayEntry, Chunk
from stillroom.cache.shard_format import ShardFormat
from stillroom.cache.testing_shard import (
    expect,
    expect_corrupt,
    expect_sound,
    expect_true,
    make_identity,
    random_stored,
)

FLIPS = 5
"""Bytes of each chunk that are flipped in turn."""
SWAPS = 5
"""Columns whose chunks stand in for a column's in turn."""
HOSTILE = 200
"""Objects that a hostile writer hashes as they are."""
ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 2, 2**31, 2**62, 0.5, "1", [], [1], {})


def check_damage(form: ShardFormat) -> None:
    """Only ranges whose hash the manifest has are read, and a damaged one is found."""
    stored = random_stored(form, positions=60, sequences=5)
    stored.read_all()
    hashed = {(chunk.offset, chunk.length): name for name, _, chunk in stored.chunks()}
    read = {one for ranges in stored.storage.reads for one in ranges}
    expect(read <= hashed.keys(), "every range that is read has a hash")
    expect(all(start + length <= len(stored.encoded.data) for start, length in read), "and exists")
    rng = np.random.default_rng(0)
    for start, length in sorted(read):
        for at in {0, length - 1, *rng.integers(0, length, FLIPS - 2).tolist()}:
            damaged = bytearray(stored.encoded.data)
            damaged[start + at] ^= 1 << int(rng.integers(8))
            stored.storage.data = bytes(damaged)
            what = f"byte {at} of a chunk of {hashed[start, length]!r} flipped"
            expect_corrupt(stored, what, names_object=True)


def check_cut_off(form: ShardFormat) -> None:
    """An object that ends early is found, wherever it ends."""
    stored = random_stored(form, positions=60, sequences=5)
    ends = sorted(chunk.offset + chunk.length - 1 for _, _, chunk in stored.chunks())
    for length in [0, 1, *ends]:
        stored.storage.data = stored.encoded.data[:length]
        expect_corrupt(stored, f"an object of {length} bytes", names_object=True)


def check_other_counts(form: ShardFormat) -> None:
    """A commit or an identity of other sizes is refused."""
    stored = random_stored(form)
    source = stored.source
    sizes = ("rows", "positions", "tokens", "teacher_prompt_tokens")
    for step in (-1, 1, 5000):
        others = [replace(source.commit, **{n: getattr(source.commit, n) + step}) for n in sizes]
        sources = [replace(source, commit=commit) for commit in others]
        topk = max(1, source.identity.topk + step)
        identities = [replace(source.identity, topk=topk, vocab_size=9999, logit_width=9999)]
        identities.append(make_identity(source.identity.topk, source.identity.vocab_size, 0))
        sources += [replace(source, identity=identity) for identity in identities]
        for other in sources:
            stored.source = other
            expect_corrupt(stored, f"{other.commit} and {other.identity}")


def check_other_manifest(form: ShardFormat) -> None:
    """A manifest that states something else of a column is refused; something else of an array that
    is none, such as a list whose last number nobody needs, is refused or changes no column."""
    stored, rng = random_stored(form), np.random.default_rng(0)
    entries = stored.source.manifest.arrays
    for name, entry in entries.items():
        refused = expect_corrupt if name in stored.arrays else expect_true
        for what, changed in _other_entries(entry):
            refused(stored.with_entry(name, changed), f"{name}: {what}")
        without = {other: e for other, e in entries.items() if other != name}
        expect_corrupt(stored.changed(arrays=without), f"{name}: no such array")
        for other in rng.choice(sorted(entries), SWAPS).tolist():
            swapped = replace(entry, chunks=entries[other].chunks)
            expect_sound(stored.with_entry(name, swapped), f"{name} with the chunks of {other}")
    more = entries | {"other": next(iter(entries.values()))}
    expect_corrupt(stored.changed(arrays=more), "an unknown array")
    for name, number, chunk in stored.chunks():
        for what, changed_chunk in _other_chunks(chunk):
            expect_corrupt(stored.with_chunk(name, number, changed_chunk), f"{name!r}: {what}")


def check_other_attributes(form: ShardFormat) -> None:
    """Attributes and row groups that a reader goes by give the columns, or an error."""
    stored = random_stored(form)
    attributes = stored.encoded.attributes
    for key in attributes.keys() - {"user_axes"}:
        others = [attributes[key] + 1] if type(attributes[key]) is int else []
        for value in [*ODD, *others]:
            expect_sound(stored.changed(attributes=attributes | {key: value}), f"{key} = {value!r}")
        less = {other: value for other, value in attributes.items() if other != key}
        expect_sound(stored.changed(attributes=less), f"no {key}")
    other_axes = {"x_reward": "position", "x_advantage": "sequence"}
    expect_corrupt(stored.changed(attributes=attributes | {"user_axes": other_axes}), "other axes")
    groups = stored.source.manifest.row_groups
    for wrong in [(), groups[:-1], (*groups, 1), (*groups, 0), (-1, 2**40), (1,) * 10_000]:
        if groups and wrong != groups:
            expect_corrupt(stored.changed(row_groups=wrong), f"row groups {wrong[:5]}")


def check_hostile_bytes(form: ShardFormat) -> None:
    """Bytes that a hostile writer hashed as they are give arrays of the right dtype and shape, or
    an error that says so; nothing else, and never another exception."""
    stored = random_stored(form, positions=900)
    rng = np.random.default_rng(0)
    chunks = stored.chunks()
    for number in range(HOSTILE):
        name, place, chunk = chunks[rng.integers(len(chunks))]
        own = stored.encoded.data[chunk.offset : chunk.offset + chunk.length]
        other = stored.forged(name, place, _hostile(rng, own))
        expect_sound(other, f"hostile object {number}: chunk {place} of {name!r}")


def _other_entries(entry: ArrayEntry) -> Iterator[tuple[str, ArrayEntry]]:
    rows, *width = entry.shape
    last = entry.chunks[-1:]
    yield "another dtype", replace(entry, dtype="int64")
    yield "a row more", replace(entry, shape=(rows + 1, *width))
    yield "a row less", replace(entry, shape=(max(0, rows - 1), *width))
    yield "many rows", replace(entry, shape=(2**32, *width))
    yield "a dimension more", replace(entry, shape=(rows, 2) if not width else (rows, width[0] + 1))
    yield "a chunk less", replace(entry, chunks=entry.chunks[:-1])
    yield "a chunk more", replace(entry, chunks=entry.chunks + last)


def _other_chunks(chunk: Chunk) -> Iterator[tuple[str, Chunk]]:
    yield "another start", replace(chunk, offset=chunk.offset - 1)
    yield "a shorter chunk", replace(chunk, length=chunk.length - 1)
    yield "a start beyond the object", replace(chunk, offset=2**40)
    yield "a length beyond the object", replace(chunk, length=2**40)
    yield "another hash", replace(chunk, hash="0" * 32)


def _hostile(rng: np.random.Generator, data: bytes) -> bytes:
    """Other bytes in place of a chunk's, not more of them."""
    kind = rng.integers(5)
    at = int(rng.integers(len(data)))
    if kind == 0:
        return data[: max(1, at)]
    if kind == 1:
        return rng.bytes(len(data))
    filler = [b"\xff" * 8, rng.bytes(1), rng.bytes(4)][kind - 2]
    return (data[:at] + filler + data[at + len(filler) :])[: len(data)]
