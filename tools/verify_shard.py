"""One committed shard read again: its manifest, every byte of its object, and with `deep` every
number too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import xxhash

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit, attempt_path, commit_path
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.manifest import Chunk, Manifest
from stillroom.cache.part import PartMeta
from stillroom.cache.shard import Shard
from stillroom.cache.shard_format import Source, shard_format, verify
from stillroom.cache.store import Cache
from stillroom.tools.container import check_container
from stillroom.tools.findings import Report
from stillroom.tools.parquet_container import check_parquet
from stillroom.tools.verify_columns import check_columns

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Rollouts:
    """A part as it was scored."""

    table: pa.Table
    meta: PartMeta
    hash: str
    """xxh3-128 of its bytes."""


@dataclass(frozen=True, slots=True)
class HeldSource(Source):
    """A shard whose object is in memory."""

    data: bytes

    def fetch(self, chunks: Sequence[tuple[str, Chunk]]) -> list[bytes]:
        """See `Source.fetch`."""
        blobs = []
        for name, chunk in chunks:
            blob = self.data[chunk.offset : chunk.offset + chunk.length]
            verify(blob, chunk.hash, f"{self.where}, {name}")
            blobs.append(blob)
        return blobs


def verify_shard(
    cache: Cache, commit: Commit, rollouts: Rollouts | None, report: Report, *, deep: bool
) -> None:
    """Verify what one commit names; everything wrong goes into the report.

    Args:
        cache: the cache.
        commit: its commit.
        rollouts: what it was made from, if that is there and sound.
        report: takes what is found.
        deep: decode everything and compare it; holds the object in memory.
    """
    shard = (commit.part, commit.n)
    with report.watch(commit_path(*shard), shard):
        commit.row_lengths()
    with report.watch(f"{attempt_path(commit.part, commit.attempt)}/manifest.json", shard):
        opened = cache.shard(commit)
        _check_manifest(cache, commit, opened.manifest)
        with report.watch(opened.path, shard):
            _check_size(cache, opened)
            if deep:
                _check_deep(cache, opened, rollouts, report)
            else:
                _check_hash(opened, _blocks(cache, opened), report)


def _check_manifest(cache: Cache, commit: Commit, manifest: Manifest) -> None:
    attributes = manifest.attributes
    found = (manifest.part, manifest.attempt, manifest.identity)
    expected = (commit.part, commit.attempt, commit.identity)
    _require(found == expected, "manifest", f"part, attempt, identity {expected}", f"{found}")
    stated = (attributes["part"], attributes["identity"], attributes["policy_version"])
    wanted = (commit.part, commit.identity, commit.policy_version)
    _require(stated == wanted, "attributes", f"part, identity, policy {wanted}", f"{stated}")
    temperature, own = attributes["temperature"], cache.identity.temperature
    _require(temperature == own, "attributes", f"temperature {own}", f"{temperature}")
    size = manifest.size + len(manifest.to_json())
    _require(size == commit.stored_bytes, "commit", f"{size} bytes", f"{commit.stored_bytes}")


def _check_size(cache: Cache, shard: Shard) -> None:
    size, expected = cache.storage.size(shard.path), shard.manifest.size
    if size is None:
        do = "Score the part again."
        raise MissingError(cache.storage.describe(shard.path), "an object", "nothing", do)
    _require(size == expected, "size", f"{expected} bytes (manifest)", f"{size}")


def _blocks(cache: Cache, shard: Shard) -> Iterator[bytes]:
    size = shard.manifest.size
    for start in range(0, size, BLOCK_BYTES):
        length = min(BLOCK_BYTES, size - start)
        yield cache.storage.get_ranges(shard.path, [start], [length], size)[0]


def _check_hash(shard: Shard, blocks: Iterator[bytes], report: Report) -> None:
    hasher = xxhash.xxh3_128()
    for block in blocks:
        hasher.update(block)
        report.add_bytes(len(block))
    found, expected = hasher.hexdigest(), shard.manifest.hash
    _require(found == expected, "object", f"hash {expected} (manifest)", found)


def _check_deep(cache: Cache, shard: Shard, rollouts: Rollouts | None, report: Report) -> None:
    """Every column is read even where the object's hash is wrong, so that all damage is named."""
    name = (shard.commit.part, shard.commit.n)
    data = cache.storage.get(shard.path)
    report.add_bytes(len(data))
    manifest = shard.manifest
    with report.watch(shard.path, name):
        found = jsonfile.digest(data)
        _require(found == manifest.hash, "object", f"hash {manifest.hash} (manifest)", found)
    with report.watch(shard.path, name):
        check = check_parquet if cache.identity.shard_format == "parquet" else check_container
        check(data, manifest)
    source = HeldSource(cache.storage, shard.path, shard.commit, cache.identity, manifest, data)
    reader = shard_format(cache.identity.shard_format).open(source)
    table = None if rollouts is None else rollouts.table
    check_columns(source, reader, table, partial(report.watch, shard.path, name))
    if rollouts is not None:
        with report.watch(shard.path, name):
            sampler, own = manifest.attributes["sampler"], rollouts.meta.sampler
            _require(sampler == own, "sampler", f"{own} (rollouts)", f"{sampler}")


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise CorruptError(where, expected, got, "Score the part again.")
