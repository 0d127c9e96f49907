"""Packing: a rank's rows of a step, without padding, into micro-batches of bounded tokens. Pure."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put rows into as few micro-batches as first-fit-decreasing finds.

    Args:
        lengths: tokens of each row, each at most max_tokens.
        max_tokens: tokens of a micro-batch.

    Returns:
        Indices into lengths; every row once. Within a micro-batch rows keep their order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if at is None:
            bins.append([])
            room.append(max_tokens)
            at = len(bins) - 1
        bins[at].append(i)
        room[at] -= lengths[i]
    return [sorted(rows) for rows in bins]


def num_micro_batches(lengths_by_rank: Sequence[Sequence[int]], max_tokens: int) -> int:
    """M: micro-batches that every rank runs, so that collective operations meet; ranks with fewer
    add empty ones."""
    return max(len(pack(lengths, max_tokens)) for lengths in lengths_by_rank)
