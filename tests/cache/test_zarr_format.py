"""Reading a Zarr shard that a hostile writer made: an error, never a wrong id, never much memory.
What every format must keep is in test_shard_format."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.codec import AUTO, encode_chunk
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import ArrayEntry, Chunk
from stillroom.cache.testing_shard import Stored, expect_corrupt, random_stored
from stillroom.cache.zarr_format import ZarrFormat
from stillroom.cache.zarr_id_groups import MAX_LOOKUP
from stillroom.cache.zarr_layout import CHUNK_ROWS, chunks_of
from tests.cache.fakes import same_bits

ROOT = Path(__file__).resolve().parents[2]
BOMB_NUMBERS = 1 << 28
"""Numbers that a chunk of some kB claims to hold: 1 GiB of them."""


@pytest.fixture(scope="module")
def stored() -> Stored:
    """A shard of two groups and one chunk an array, but for the codes."""
    made = random_stored(ZarrFormat(), positions=2100)
    assert made.encoded.attributes["id_groups"] == 4
    return made


def with_lists(stored: Stored, **changes: Any) -> Stored:
    """The same shard with other attributes."""
    return stored.changed(attributes=stored.encoded.attributes | changes)


@pytest.mark.parametrize("name", ["topk_code", "topk_group"])
@pytest.mark.parametrize("beyond", [0, 1, 2**15])
def test_codes_and_groups_beyond_the_lists_are_refused(
    stored: Stored, name: str, beyond: int
) -> None:
    entry = stored.source.manifest.arrays[name]
    attributes = stored.encoded.attributes
    groups, width = attributes["id_groups"], attributes["id_group_width"]
    distinct = stored.source.manifest.arrays["topk_list"].shape[0] - groups * width
    end = width + distinct if name == "topk_code" else groups
    numbers = np.zeros((CHUNK_ROWS, *entry.shape[1:]), entry.dtype)
    numbers[7] = end - 1
    stored.forged(name, 0, encode_chunk(numbers, AUTO)).read_all()
    numbers[7] = end + beyond
    forged = stored.forged(name, 0, encode_chunk(numbers, AUTO))
    expected = f"topk_code, chunk 0: expected codes below {width + distinct} and groups below"
    with pytest.raises(CorruptError, match=f"{expected} {groups}"):
        forged.read_all()
    found = forged.open().read_ranges([("topk_id", 1000, 1012)])[0]
    assert found.shape == (12, stored.arrays["topk_id"].shape[1])


@pytest.mark.parametrize("key", ["id_groups", "id_group_width"])
@pytest.mark.parametrize("value", [None, "4", 4.0, [4], -1, MAX_LOOKUP + 1, 2**63, 10**6], ids=repr)
def test_sizes_of_lists_that_cannot_be_are_refused(stored: Stored, key: str, value: object) -> None:
    expect_corrupt(with_lists(stored, **{key: value}), f"{key} = {value}", names_object=True)


def test_no_groups_and_lists_larger_than_what_is_stored_are_refused(stored: Stored) -> None:
    length = stored.source.manifest.arrays["topk_list"].shape[0]
    for groups, width in [(0, 0), (0, 512), (1, length + 1), (length + 1, 1), (2, 0), (1, 0)]:
        changed = with_lists(stored, id_groups=groups, id_group_width=width)
        expect_corrupt(changed, f"{groups} groups of {width}", names_object=True)


@pytest.mark.parametrize("extra", [1, 5000, 2**31, 2**39])
def test_longer_lists_are_refused_before_they_are_read(stored: Stored, extra: int) -> None:
    """More ids than the vocabulary and the unused one, though the hashes are right."""
    entry = stored.source.manifest.arrays["topk_list"]
    vocab_size = stored.source.identity.vocab_size
    attributes = stored.encoded.attributes
    length = attributes["id_groups"] * attributes["id_group_width"] + vocab_size + 1 + extra
    chunks = entry.chunks[:1] * min(chunks_of(length), 5000)
    forged = stored.with_entry("topk_list", ArrayEntry("uint32", (length,), chunks))
    forged.storage.reads.clear()
    with pytest.raises(CorruptError):
        forged.open()
    assert not forged.storage.reads


def test_the_longest_lists_are_read(stored: Stored) -> None:
    entry = stored.source.manifest.arrays["topk_list"]
    attributes = stored.encoded.attributes
    vocab_size = stored.source.identity.vocab_size
    length = attributes["id_groups"] * attributes["id_group_width"] + vocab_size + 1
    assert chunks_of(length) == len(entry.chunks)
    longest = stored.with_entry("topk_list", ArrayEntry("uint32", (length,), entry.chunks))
    assert same_bits(longest.read_all()["topk_id"], stored.arrays["topk_id"])


def test_a_chunk_of_another_count_is_refused(stored: Stored) -> None:
    for name, entry in stored.source.manifest.arrays.items():
        numbers = CHUNK_ROWS * int(np.prod(entry.shape[1:]))
        for count in (0, 1, numbers - 1, numbers + 1, 2 * numbers):
            forged = stored.forged(name, 0, encode_chunk(np.ones(count, entry.dtype), AUTO))
            expect_corrupt(forged, f"{count} numbers of {name}", names_object=True)


def test_a_range_that_is_empty_reads_nothing(stored: Stored) -> None:
    reader = stored.open()
    stored.storage.reads.clear()
    found = reader.read_ranges([("token", 3, 3), ("topk_logprob", 0, 0)])
    assert [array.shape for array in found] == [(0,), (0, stored.arrays["topk_id"].shape[1])]
    assert not stored.storage.reads


def test_the_lists_of_ids_are_read_once(stored: Stored) -> None:
    reader = stored.open()
    lists = [(chunk.offset, chunk.length) for chunk in chunks_named(stored, "topk_list")]
    stored.storage.reads.clear()
    for _ in range(3):
        wanted = [("topk_id", 5, 9), ("token", 0, 1), ("topk_id", 0, 2100), ("topk_id", 3, 3)]
        for (name, start, stop), found in zip(wanted, reader.read_ranges(wanted), strict=True):
            assert same_bits(found, stored.arrays[name][start:stop])
    asked = [one for ranges in stored.storage.reads for one in ranges]
    assert all(asked.count(one) == 1 for one in lists)


def chunks_named(stored: Stored, name: str) -> tuple[Chunk, ...]:
    """Chunks of an array."""
    return stored.source.manifest.arrays[name].chunks


@pytest.mark.dist
def test_a_chunk_that_claims_to_inflate_takes_no_memory() -> None:
    """In a process of its own, which says by how much its largest size grew."""
    command = [sys.executable, "-m", "tests.cache.test_zarr_format"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown_kib = int(done.stdout)
    assert grown_kib < 32 << 10


def make_bomb() -> bytes:
    """13 kB of PCodec that are 1 GiB of zeros: its last 2^18 numbers, 13 bytes, again and again."""
    data = encode_chunk(np.zeros(1 << 20, np.uint32), AUTO)
    last = data[-14:-1]
    assert data.count(last) == 4
    return data[:-1] + last * ((BOMB_NUMBERS >> 18) - 4) + data[-1:]


def read_bombs() -> int:
    """Read shards with a chunk that claims 1 GiB; by how many KiB the process grew."""
    stored = random_stored(ZarrFormat(), positions=2100)
    stored.read_all()
    bomb = make_bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("token", "topk_list", "topk_code", "sampled_logprob"):
        expect_corrupt(stored.forged(name, 0, bomb), name, names_object=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


if __name__ == "__main__":
    print(read_bombs())
