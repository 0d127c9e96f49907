"""A position's used entries: end to end in rows of K, as Zarr shards store them, and back to K a
position. Where all K are used, both are the same."""

import numpy as np


def pack_entries(entries: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The used ones of (P, K) entries end to end, as (R, K); the last row is filled up with 0."""
    topk = entries.shape[1]
    if (count == topk).all():
        return entries
    used = entries[np.arange(topk) < count[:, None]]
    packed = np.zeros((-(-len(used) // topk), topk), entries.dtype)
    packed.reshape(-1)[: len(used)] = used
    return packed


def unpack_entries(
    used: np.ndarray, count: np.ndarray, topk: int, unused: int | float
) -> np.ndarray:
    """(P, K) entries of positions that use `count` each, from those end to end."""
    out = np.full((len(count), topk), unused, used.dtype)
    out[np.arange(topk) < count[:, None]] = used
    return out
