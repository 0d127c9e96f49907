"""Encoded bytes of one chunk, and back: PCodec for every number, in its standalone format.

Decoding never yields more or fewer numbers than the caller asked for, whatever the bytes say.
"""

from typing import Any

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from stillroom.cache.errors import CorruptError

LEVEL = 8
AUTO: dict[str, Any] = {}
UNORDERED = {"delta_spec": "none"}
CODES = {"mode_spec": "classic", "delta_spec": "none"}
DIFFERENCES = {
    "level": 9,
    "mode_spec": "classic",
    "delta_spec": "try_consecutive",
    "delta_encoding_order": 1,
}
"""Settings by their names in numcodecs; a decoder needs none of them. All but AUTO spare searches
that take half of the time."""


def encode_chunk(numbers: np.ndarray, settings: dict[str, Any]) -> bytes:
    """Encode numbers in row-major order with settings such as AUTO or CODES."""
    mode = ModeSpec.classic() if "mode_spec" in settings else ModeSpec.auto()
    delta = DeltaSpec.auto()
    if "delta_encoding_order" in settings:
        delta = DeltaSpec.try_consecutive(settings["delta_encoding_order"])
    elif "delta_spec" in settings:
        delta = DeltaSpec.none()
    config = ChunkConfig(settings.get("level", LEVEL), mode_spec=mode, delta_spec=delta)
    return bytes(standalone.simple_compress(np.ascontiguousarray(numbers).reshape(-1), config))


def decode_chunk(data: bytes, out: np.ndarray, where: str, size: int | None = None) -> None:
    """Decode the first `out.size` numbers, from bytes whose hash was verified, into a contiguous
    array.

    Args:
        data: an encoded chunk.
        out: where the numbers go; those behind are not decoded.
        where: named by the error.
        size: numbers that the chunk holds; None for `out.size`.

    Raises:
        CorruptError: the bytes hold another count or dtype, or cannot be decoded.
    """
    count, do = out.size, "Score the part again."
    whole = size is None or size == count
    try:
        progress = standalone.simple_decompress_into(data, out.reshape(-1))
    except (ValueError, RuntimeError, TypeError) as error:
        raise CorruptError(where, f"{count} encoded numbers", str(error), do) from error
    if progress.n_processed != count or progress.finished != whole:
        found = f"{progress.n_processed}{'' if progress.finished else ' and more'}"
        raise CorruptError(where, f"{count} encoded numbers", found, do)
