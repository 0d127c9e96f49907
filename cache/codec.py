"""Encoded bytes of one chunk, and back: PCodec for every number, through zarr's codec of that name
when writing.

Decoding never yields more or fewer numbers than the caller asked for, whatever the bytes say.
"""

import numpy as np
from pcodec import standalone

from stillroom.cache.errors import CorruptError


def decode_chunk(data: bytes, dtype: np.dtype, count: int, where: str) -> np.ndarray:
    """Decode exactly `count` numbers from bytes whose hash was verified.

    Raises:
        CorruptError: the bytes hold another count, or cannot be decoded.
    """
    out = np.empty(count, dtype)
    try:
        progress = standalone.simple_decompress_into(data, out)
    except (ValueError, RuntimeError, TypeError) as error:
        do = "Score the part again."
        raise CorruptError(where, f"{count} encoded numbers", str(error), do) from error
    if progress.n_processed != count or not progress.finished:
        found = f"{progress.n_processed}{'' if progress.finished else ' and more'}"
        raise CorruptError(where, f"{count} encoded numbers", found, "Score the part again.")
    return out
