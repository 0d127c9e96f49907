"""Token ids as two-byte codes into a list of their own, made for compressors that look at single
bytes.

Zstandard codes bytes one by one, at a cost of about -log2 of a byte's frequency. Ids are ranked by
frequency, and pairs of bytes (a, b) by (a + C) (b + C): where frequencies fall like 1 / rank, the
bytes of a code are then close to independent of each other, and the two costs add up to what the id
itself is worth.
"""

from dataclasses import dataclass

import numpy as np

MAX_CODES = 1 << 16
MAX_ID = 1 << 24
"""Ids from here on are not counted: the table of counts would be too large."""
OFFSET = 6
"""C, which flattens the head of the distribution; from 3 to 10 sizes differ by less than 1 %."""
SPARE = 2
"""The square of pairs has so many times as many places as there are ids, so that its hyperbola of
small products can hold them."""


@dataclass(frozen=True, slots=True)
class IdCodes:
    """Codes of ids."""

    code: np.ndarray
    """uint16, shaped like the ids."""
    id_list: np.ndarray
    """(n,) uint32: the id of each code, 0 where a code is not used; at most 2^16."""


def code_ids(ids: np.ndarray) -> IdCodes | None:
    """Code uint32 ids; 2^32 - 1, an unused entry, counts as an id.

    Returns:
        None if there are too many different ids, or too large ones.
    """
    shifted = ids + np.uint32(1)  # an unused entry becomes 0
    if not ids.size or shifted.max() > MAX_ID:
        return None
    count = np.bincount(shifted.ravel())
    seen = np.flatnonzero(count)
    if len(seen) > MAX_CODES:
        return None
    by_frequency = seen[np.argsort(-count[seen], kind="stable")]
    place = _places(len(seen))
    code_of = np.zeros(len(count), np.uint16)
    code_of[by_frequency] = place
    id_list = np.zeros(int(place.max()) + 1, np.uint32)
    id_list[place] = (by_frequency - 1).astype(np.int64).astype(np.uint32)
    return IdCodes(code_of.take(shifted), id_list)


def _places(number: int) -> np.ndarray:
    """(number,) int64: codes by rank, first those whose bytes have the smallest product."""
    side = min(256, int(np.ceil(np.sqrt(SPARE * number))))
    factor = np.arange(side) + OFFSET
    order = np.argsort(np.outer(factor, factor).ravel(), kind="stable")[:number]
    return order // side * 256 + order % side
