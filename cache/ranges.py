"""Byte ranges of an object: which of them share a request."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.cache.errors import CorruptError

GAP_BYTES = 1 << 20
"""Ranges no further apart than this share a request: reading a mebibyte too much takes about as
long as asking once more."""
SPAN_BYTES = 32 << 20
"""No request grows beyond this, so that large reads go over several connections at once and each
ends well before its time limit. A single range may be longer."""


@dataclass(slots=True)
class Span:
    """Bytes [start, stop) of an object, which one request reads."""

    start: int
    stop: int
    members: list[int]
    """Indices of the ranges that lie in it."""


def coalesce(starts: Sequence[int], lengths: Sequence[int]) -> list[Span]:
    """The fewest requests for some ranges: neighbours share one; empty ranges need none."""
    spans: list[Span] = []
    for index in sorted(range(len(starts)), key=starts.__getitem__):
        start, stop = starts[index], starts[index] + lengths[index]
        last = spans[-1] if spans else None
        if not lengths[index]:
            continue
        if (
            last is not None
            and start - last.stop <= GAP_BYTES
            and max(stop, last.stop) - last.start <= SPAN_BYTES
        ):
            last.stop = max(stop, last.stop)
            last.members.append(index)
        else:
            spans.append(Span(start, stop, [index]))
    return spans


def wrong_size(where: str, expected: int, found: int) -> CorruptError:
    """The error of an object that is shorter or longer than what was written."""
    return CorruptError(
        where,
        f"an object of {expected} bytes",
        f"{found} bytes",
        "It was damaged after its commit: restore it, or score the part again.",
    )


def too_large(where: str, max_bytes: int, found: int) -> CorruptError:
    """The error of an object that is longer than any of its kind can be."""
    return CorruptError(where, f"at most {max_bytes} bytes", f"{found} bytes", "Restore the file.")
