"""Reading a Parquet shard, beyond the contract of all formats: row groups, counts and teacher
prompts that a hostile writer made up, and what is read when."""

from typing import Any

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.example_shards import edges, random_shard
from stillroom.cache.manifest import ArrayEntry, Chunk
from stillroom.cache.parquet_layout import GROUP_TOKENS, MAGIC
from stillroom.cache.parquet_levels import nested_levels
from stillroom.cache.parquet_pages import data_page, dictionary_page, read_pages
from stillroom.cache.parquet_shard import ParquetFormat
from stillroom.cache.schema import Arrays
from stillroom.cache.testing_shard import (
    Stored,
    expect_corrupt,
    expect_same,
    random_stored,
    stored_shard,
)
from tests.cache.fakes import same_bits


@pytest.fixture
def stored() -> Stored:
    """A shard of three row groups, the first two of two pages each."""
    made = random_stored(ParquetFormat(), positions=20_000, sequences=50)
    assert len(made.encoded.row_groups) == 3
    return made


def long_sequences(topk: int, *lengths: int) -> Arrays:
    """A shard of sequences with these numbers of positions."""
    arrays = random_shard(0, sum(lengths), len(lengths), topk=topk, vocab_size=topk + 9)
    arrays["scored"] = np.concatenate([[0, *[1] * n] for n in lengths]).astype(np.uint16)
    arrays["token"] = np.arange(len(arrays["scored"]), dtype=np.uint32)
    arrays["prompt_length"] = np.ones(len(lengths), np.uint32)
    arrays["position_start"] = edges(lengths)
    arrays["sequence_start"] = edges([n + 1 for n in lengths])
    return arrays


@pytest.mark.parametrize(
    ("topk", "lengths", "groups"),
    [
        (3, (9000, 5, 8187, 1), (1, 2, 1)),
        (3, (8192, 8192), (1, 1)),
        (3, (1, 20_000), (1, 1)),
        (1000, (1047, 1, 1, 1500), (2, 1, 1)),
    ],
)
def test_long_sequences_have_row_groups_of_their_own(
    topk: int, lengths: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    arrays = long_sequences(topk, *lengths)
    made = stored_shard(ParquetFormat(), arrays, topk=topk, vocab_size=topk + 9)
    assert made.encoded.row_groups == groups
    expect_same(made.read_all(), arrays, f"{lengths}")


def test_row_groups_that_are_too_large_are_refused() -> None:
    """A group may be as large as its only sequence, but several sequences are bounded."""
    for lengths, tokens in (((5000, 5000), 0), ((5, 5), GROUP_TOKENS)):
        arrays = long_sequences(3, *lengths)
        more = np.zeros(tokens, np.uint32)
        arrays["token"] = np.concatenate([more, arrays["token"]])
        arrays["scored"] = np.concatenate([more.astype(np.uint16), arrays["scored"]])
        arrays["sequence_start"][1:] += tokens
        arrays["prompt_length"][0] += tokens
        made = stored_shard(ParquetFormat(), arrays, topk=3, vocab_size=12)
        assert made.encoded.row_groups == (1, 1)
        entries = made.source.manifest.arrays
        first = {
            name: type(entry)(entry.dtype, entry.shape, entry.chunks[:1])
            for name, entry in entries.items()
        }
        with pytest.raises(CorruptError, match=r"row groups: expected at most 8192 positions"):
            made.changed(arrays=first, row_groups=(2,)).open()


def test_chunks_that_overlap_are_refused(stored: Stored) -> None:
    """Or a few bytes could be decoded again and again."""
    chunks = stored.source.manifest.arrays["token"].chunks
    expect_corrupt(stored.with_chunk("token", 1, chunks[0]), "the same chunk twice")


def with_column(stored: Stored, name: str, data: bytes) -> Stored:
    """A shard of one row group whose writer stored other bytes as a column."""
    entries, body, changed = stored.source.manifest.arrays, MAGIC, {}
    for own, entry in sorted(entries.items(), key=lambda item: item[1].chunks[0].offset):
        chunk = entry.chunks[0]
        new = stored.encoded.data[chunk.offset : chunk.offset + chunk.length]
        new = data if own == name else new
        chunks = (Chunk(len(body), len(new), jsonfile.digest(new)),)
        changed[own] = ArrayEntry(entry.dtype, entry.shape, chunks)
        body += new
    out = stored.changed(arrays=changed, size=len(body))
    out.storage.data = body
    return out


def with_counts(stored: Stored, name: str, count: np.ndarray) -> Stored:
    """The same values of a column in inner lists of other lengths."""
    chunk = stored.source.manifest.arrays[name].chunks[0]
    data = stored.encoded.data[chunk.offset : chunk.offset + chunk.length]
    *dictionary, page = read_pages(data)
    outer = np.diff(stored.arrays["position_start"].astype(int))
    old = nested_levels(outer, stored.arrays["topk_count"].astype(int))
    new = nested_levels(outer, count)
    values = page.decompress()[len(old.data) :]
    pages = [dictionary_page(own.decompress(), own.entries) for own in dictionary]
    pages.append(data_page(new.data, values, new.entries, page.encoding))
    return with_column(stored, name, b"".join(own.data for own in pages))


@pytest.mark.parametrize("name", ["topk_id", "topk_logprob"])
def test_ids_and_logprobs_of_other_counts_are_refused(name: str) -> None:
    settings: dict[str, Any] = {"positions": 300, "sequences": 5, "extra": 0}
    made = random_stored(ParquetFormat(), **settings)
    count = made.arrays["topk_count"].astype(int)
    expect_same(with_counts(made, name, count).read_all(), made.arrays, "written alike")
    swapped = count.copy()
    first = int(np.flatnonzero(count[:-1] != count[1:])[0])
    swapped[[first, first + 1]] = count[[first + 1, first]]
    forged = with_counts(made, name, swapped)
    with pytest.raises(CorruptError, match="as many ids as topk_logprob"):
        forged.read_all()
    assert forged.open().read_ranges([(name, 0, 300)])[0].shape == made.arrays[name].shape


@pytest.mark.parametrize(("before", "after"), [((1, 1), (0, 2)), ((6, 2), (7, 1))])
def test_positions_of_no_or_too_many_entries_are_refused(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    made = random_stored(ParquetFormat(), positions=300, sequences=5, extra=0)
    count = made.arrays["topk_count"].astype(int)
    first = int(np.flatnonzero(count == before[0])[0])
    second = int(np.flatnonzero(count == before[1])[-1])
    count[[first, second]] = after
    forged = with_counts(made, "topk_logprob", count)
    with pytest.raises(CorruptError, match=r"topk_logprob, row group 0: .* got other than 6"):
        forged.read_all()


def test_teacher_prompts_are_located_once(stored: Stored) -> None:
    reader = stored.open()
    stored.storage.reads.clear()
    length = len(stored.arrays["teacher_prompt"])
    wanted = [("teacher_prompt", length - 3, length), ("teacher_prompt_start", 0, 51)]
    for requests in (2, 1, 1):
        stored.storage.reads.clear()
        found = reader.read_ranges(wanted)
        assert len(stored.storage.reads) == requests
        for (name, start, stop), array in zip(wanted, found, strict=True):
            assert same_bits(array, stored.arrays[name][start:stop])


def test_edges_need_no_request_where_no_teacher_prompt_is() -> None:
    made = random_stored(ParquetFormat(), teacher_prompts=False)
    made.storage.reads.clear()
    names = ("sequence_start", "position_start", "teacher_prompt_start")
    found = made.open().read_ranges([(name, 2, 9) for name in names])
    assert all(same_bits(a, made.arrays[name][2:9]) for name, a in zip(names, found, strict=True))
    assert not made.storage.reads


def test_a_range_that_is_empty_reads_nothing(stored: Stored) -> None:
    reader = stored.open()
    stored.storage.reads.clear()
    found = reader.read_ranges([("token", 3, 3), ("topk_logprob", 0, 0), ("topk_count", 5, 5)])
    assert [array.shape for array in found] == [(0,), (0, 6), (0,)]
    assert [array.dtype for array in found] == [np.uint32, np.float16, np.uint16]
    assert not stored.storage.reads


def test_arrays_can_be_written_to(stored: Stored) -> None:
    for array in stored.read_all().values():
        array[:1] = 0
