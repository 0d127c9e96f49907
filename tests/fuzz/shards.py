"""Shards in both formats: manifests, chunks and pages with the right hashes, and whole objects."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.codec import AUTO, decode_chunk, encode_chunk
from stillroom.cache.commits import Commit, attempt_path
from stillroom.cache.manifest import Manifest
from stillroom.cache.parquet_layout import RLE_DICTIONARY
from stillroom.cache.parquet_pages import DICTIONARY_PAGE, data_page, dictionary_page, read_pages
from stillroom.cache.shard_format import shard_format
from stillroom.cache.store import Cache
from stillroom.cache.testing_shard import Stored, random_stored
from stillroom.tools.container import check_container
from stillroom.tools.findings import Report
from stillroom.tools.parquet_container import check_parquet
from stillroom.tools.verify_shard import Rollouts, verify_shard
from tests.fuzz.attempt import attempt
from tests.fuzz.hostile import rehashed_manifest
from tests.fuzz.memory import objects_of, small_cache, with_objects
from tests.fuzz.mutate import mutate_bytes, mutate_footer, mutate_json
from tests.tools.small_cache import LIVE

FORMATS = ("zarr", "parquet")
DTYPES = ("uint16", "uint32", "uint64", "int32", "float16", "float32")
CODEC_NUMBERS = 96


def _manifest_path(form: str) -> str:
    return f"{attempt_path(LIVE, small_cache(form).commit_of(LIVE).attempt)}/manifest.json"


def _shard_object(form: str) -> bytes:
    folder = _manifest_path(form).rpartition("/")[0]
    return objects_of(small_cache(form))[f"{folder}/{shard_format(form).object_name}"]


def _manifests(form: str) -> list[bytes]:
    return [objects_of(small_cache(form))[_manifest_path(form)]]


def _read_manifest(form: str, data: bytes) -> None:
    """Read and verify a shard under another manifest, which its commit names."""
    changed = with_objects(small_cache(form), {_manifest_path(form): data})
    commit = replace(changed.commit_of(LIVE), manifest_hash=jsonfile.digest(data))
    attempt(lambda: _read_shard(changed, commit))
    verify_shard(changed, commit, _rollouts(form), Report(), deep=True)


@cache
def _rollouts(form: str) -> Rollouts:
    return Rollouts(*small_cache(form).read_part(LIVE))


def _read_shard(changed: Cache, commit: Commit) -> None:
    shard = changed.shard(commit)
    shard.all_rows()
    shard.read_ranges([(name, 0, None) for name in shard.columns])


def _forge_manifest(form: str, data: bytes) -> Iterator[bytes]:
    return rehashed_manifest(data, _shard_object(form))


@cache
def _stored(form: str) -> Stored:
    return random_stored(shard_format(form), positions=40, sequences=5)


def _chunks(form: str) -> list[bytes]:
    """Each chunk behind a byte with its number."""
    whole = _stored(form).encoded.data
    places = enumerate(_stored(form).chunks())
    return [bytes([at]) + whole[c.offset : c.offset + c.length] for at, (_, _, c) in places]


def _read_chunk(form: str, data: bytes) -> None:
    """Read a shard with the chunk of that number replaced, and the hash of the new one."""
    stored = _stored(form)
    name, number, _ = stored.chunks()[data[0] % len(stored.chunks())] if data else ("", 0, None)
    if len(data) < 2:
        return
    stored.forged(name, number, data[1:]).read_all()


def _pages() -> list[bytes]:
    """Each page, decompressed, behind the number of its chunk, its entries, and its encoding."""
    found = []
    for chunk in _chunks("parquet"):
        for page in read_pages(chunk[1:]):
            is_dictionary = page.kind == DICTIONARY_PAGE
            head = (page.entries << 5 | page.encoding << 1 | is_dictionary).to_bytes(4, "little")
            found.append(chunk[:1] + head + page.decompress())
    return found


def _read_page(data: bytes) -> None:
    """Read a shard in which one column is one page, with its dictionary as it was."""
    if len(data) < 6:
        return
    stored = _stored("parquet")
    name, number, chunk = stored.chunks()[data[0] % len(stored.chunks())]
    head, raw = int.from_bytes(data[1:5], "little"), data[5:]
    entries, encoding, is_dictionary = head >> 5, head >> 1 & 15, head & 1
    own = stored.encoded.data[chunk.offset : chunk.offset + chunk.length]
    pages = list(read_pages(own))
    if is_dictionary:
        new = dictionary_page(raw, entries).data
        new += data_page(b"", pages[-1].decompress(), pages[-1].entries, RLE_DICTIONARY).data
    else:
        first = pages[0]
        coded = first.kind == DICTIONARY_PAGE
        new = dictionary_page(first.decompress(), first.entries).data if coded else b""
        new += data_page(b"", raw, entries, encoding).data
    stored.forged(name, number, new).read_all()


def _encoded() -> list[bytes]:
    """Chunks of PCodec behind a byte with the dtype."""
    rng = np.random.default_rng(0)
    numbers = [rng.integers(0, 1000, CODEC_NUMBERS).astype(dtype) for dtype in DTYPES]
    return [bytes([i]) + encode_chunk(a, AUTO) for i, a in enumerate(numbers)]


def _decode(data: bytes) -> None:
    if data:
        out = np.empty(CODEC_NUMBERS, DTYPES[data[0] % len(DTYPES)])
        decode_chunk(data[1:], out, "chunk")


def _read_object(form: str, data: bytes) -> None:
    """Verify a whole object under the manifest of a sound one."""
    manifest = Manifest.from_json(_manifests(form)[0], "manifest")
    check = check_parquet if form == "parquet" else check_container
    check(data, manifest)


KINDS: dict[str, tuple[Any, ...]] = {
    "pcodec": (_encoded, _decode, mutate_bytes),
    "parquet page": (_pages, _read_page, mutate_bytes),
}
for _form in FORMATS:
    KINDS |= {
        f"{_form} manifest": (
            partial(_manifests, _form),
            partial(_read_manifest, _form),
            mutate_json,
            partial(_forge_manifest, _form),
        ),
        f"{_form} chunk": (partial(_chunks, _form), partial(_read_chunk, _form), mutate_bytes),
        f"{_form} object": (
            lambda form=_form: [_shard_object(form)],
            partial(_read_object, _form),
            mutate_footer,
        ),
    }
