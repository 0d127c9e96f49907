"""Whether a Zarr shard's object is a ZIP that plain zarr reads as the manifest says: the expected
members, metadata and indexes.

Metadata is compared with what the format says, value by value; zarr itself is not needed.
"""

import io
import zipfile
import zlib
from typing import Any

import google_crc32c
import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from stillroom.cache.zarr_layout import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    array_metadata,
    block_key,
    block_slots,
    group_metadata,
)

MAX_METADATA_BYTES = 1 << 20
MAX_OVERHEAD_BYTES = 4 << 20
CHUNK_OVERHEAD_BYTES = 64
"""The archive may have so many bytes besides the chunks: its directory takes more in memory."""
GROUP = "zarr.json"
NO_CHUNK = 2**64 - 1
CRC_BYTES = 4
LOCAL_HEADER_BYTES = 30
ENCODER_ONLY = {"level", "mode_spec", "delta_spec", "delta_encoding_order"}
BLOCK_CHUNKS = BLOCK_ROWS // CHUNK_ROWS


def check_container(data: bytes, manifest: Manifest) -> None:
    """Refuse an object that plain zarr would not read as the manifest says.

    Args:
        data: the whole object.
        manifest: its manifest.

    Raises:
        CorruptError: no ZIP, other members, compressed ones, other metadata, or an index that
            names other chunks.
    """
    chunks = [chunk for entry in manifest.arrays.values() for chunk in entry.chunks]
    overhead = len(data) - sum(chunk.length for chunk in chunks)
    most = MAX_OVERHEAD_BYTES + CHUNK_OVERHEAD_BYTES * len(chunks)
    if not 0 <= overhead <= most:
        raise _corrupt("container", f"at most {most} bytes besides the chunks", f"{overhead}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_members(archive, manifest)
            for name, expected in _metadata(manifest).items():
                found = jsonfile.load(archive.read(name), name, MAX_METADATA_BYTES)
                _check_equal(found, expected, name)
            for name, entry in manifest.arrays.items():
                _check_blocks(data, archive, name, entry)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise _corrupt("container", "a ZIP with JSON metadata", str(error)) from error


def _metadata(manifest: Manifest) -> dict[str, dict[str, Any]]:
    arrays = {
        f"{name}/zarr.json": array_metadata(name, entry.dtype, entry.shape)
        for name, entry in manifest.arrays.items()
    }
    return {GROUP: group_metadata(manifest.attributes), **arrays}


def _blocks(name: str, entry: ArrayEntry) -> list[str]:
    """Members that hold an array's blocks."""
    count = -(-entry.shape[0] // BLOCK_ROWS)
    return [block_key(name, block, entry.shape[1:]) for block in range(count)]


def _check_members(archive: zipfile.ZipFile, manifest: Manifest) -> None:
    expected = [*_metadata(manifest)]
    for name, entry in manifest.arrays.items():
        expected += _blocks(name, entry)
    members = archive.infolist()
    names = sorted(member.filename for member in members)
    if names != sorted(expected):
        differing = sorted(set(names) ^ set(expected)) or ["one member twice"]
        got = f"{len(names)}; see {differing[0]}"
        raise _corrupt("container", f"{len(expected)} members", got)
    for member in members:
        large = member.filename.endswith(GROUP) and member.file_size > MAX_METADATA_BYTES
        if member.compress_type != zipfile.ZIP_STORED or large:
            expected_kind = "uncompressed members and small metadata"
            raise _corrupt("container", expected_kind, member.filename)


def _check_blocks(data: bytes, archive: zipfile.ZipFile, name: str, entry: ArrayEntry) -> None:
    """Members, their checksums and the indexes in them must lead to the manifest's chunks."""
    for block, key in enumerate(_blocks(name, entry)):
        info = archive.getinfo(key)
        start = _content_start(data, info)
        member = memoryview(data)[start : start + info.file_size]
        if len(member) != info.file_size or zlib.crc32(member) != info.CRC:
            raise _corrupt(key, f"{info.file_size} bytes with crc {info.CRC}", "others")
        chunks = entry.chunks[block * BLOCK_CHUNKS : (block + 1) * BLOCK_CHUNKS]
        _check_index(member, start, chunks, block_slots(entry.shape[0]), key)


def _content_start(data: bytes, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin, behind its local header, name and extra field."""
    header = data[info.header_offset : info.header_offset + LOCAL_HEADER_BYTES]
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return info.header_offset + LOCAL_HEADER_BYTES + name + extra


def _check_index(
    member: memoryview, start: int, chunks: tuple[Chunk, ...], slots: int, key: str
) -> None:
    index_bytes = slots * 16
    index = bytes(member[-index_bytes - CRC_BYTES : -CRC_BYTES])
    crc = int.from_bytes(member[-CRC_BYTES:], "little")
    if len(index) != index_bytes or google_crc32c.value(index) != crc:
        raise _corrupt(key, f"an index of {slots} chunks with its crc32c", "none")
    expected = [[chunk.offset - start, chunk.length] for chunk in chunks]
    expected += [[NO_CHUNK, NO_CHUNK]] * (slots - len(chunks))
    if np.frombuffer(index, "<u8").reshape(slots, 2).tolist() != expected:
        raise _corrupt(key, "an index of the manifest's chunks", "of others")


def _check_equal(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    if _settings(found) and _settings(expected):
        _settings(found)["configuration"] = _settings(expected)["configuration"]
    if found != expected:
        keys = sorted(expected.keys() | found.keys())
        key = next(k for k in keys if k not in found or found[k] != expected.get(k))
        raise _corrupt(where, f"{key} = {expected.get(key)!r:.200}", f"{found.get(key)!r:.200}")


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """The chunk codec in an array's metadata, if its settings are of the kind that only an encoder
    reads: another release may choose others."""
    try:
        codec = metadata["codecs"][0]["configuration"]["codecs"][0]
        known = (
            codec["name"] == "numcodecs.pcodec" and codec["configuration"].keys() <= ENCODER_ONLY
        )
        return codec if known else {}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}


def _corrupt(where: str, expected: str, got: str) -> CorruptError:
    return CorruptError(where, expected, got, "Score the part again.")
