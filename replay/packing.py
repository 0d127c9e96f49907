"""Packing: a rank's rows of a step, without padding, into micro-batches of bounded tokens. Pure.

What is packed are *items*: rows, or rows of one prompt that share it and stay together.
"""

import heapq
from collections.abc import Sequence


def pack(tokens: Sequence[int], max_tokens: int, max_items: int | None = None) -> list[list[int]]:
    """Put items into as few micro-batches as first-fit-decreasing finds.

    Args:
        tokens: of each item, each at most max_tokens.
        max_tokens: tokens of a micro-batch.
        max_items: items of a micro-batch; None for any number.

    Returns:
        Indices into tokens; every item once. Within a micro-batch items keep their order.
    """
    most = len(tokens) if max_items is None else max_items
    bins: list[list[int]] = []
    room: dict[int, int] = {}  # in tokens, of each micro-batch that takes another item
    for i in _longest_first(tokens):
        at = next((b for b, free in room.items() if tokens[i] <= free), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room[at] = max_tokens
        bins[at].append(i)
        room[at] -= tokens[i]
        if len(bins[at]) == most or not room[at]:
            del room[at]
    return [sorted(items) for items in bins]


def num_micro_batches(
    tokens_by_rank: Sequence[Sequence[int]], max_tokens: int, max_items: int | None = None
) -> int:
    """M: micro-batches that every rank runs, so that collective operations meet; ranks with fewer
    add empty ones."""
    return max(len(pack(tokens, max_tokens, max_items)) for tokens in tokens_by_rank)


def balance(
    tokens: Sequence[int], count: int, max_tokens: int, max_items: int | None = None
) -> list[list[int]]:
    """Spread items over micro-batches that all ranks run anyway, so that the largest is small.

    The longest item goes first, each to the micro-batch with the fewest tokens that has room for
    another item. Where one gets more than `max_tokens` that way, `pack` decides.

    Args:
        tokens: of each item, each at most max_tokens.
        count: M, at least the micro-batches that `pack` needs.
        max_tokens: tokens of a micro-batch.
        max_items: items of a micro-batch; None for any number.

    Returns:
        Indices into tokens, as `pack` returns them; at most `count` lists, none of them empty.
    """
    most = len(tokens) if max_items is None else max_items
    bins: list[list[int]] = [[] for _ in range(min(count, len(tokens)))]
    least = [(0, b) for b in range(len(bins))]
    for i in _longest_first(tokens):
        filled, b = heapq.heappop(least)
        if filled + tokens[i] > max_tokens:
            return pack(tokens, max_tokens, max_items)
        bins[b].append(i)
        if len(bins[b]) < most:
            heapq.heappush(least, (filled + tokens[i], b))
    return [sorted(items) for items in bins]


def deal(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Share out items among ranks, the longest first to the rank with the fewest tokens, until it
    has its part of their number, rounded up.

    Returns:
        Indices into tokens; every item once, in order within a rank.
    """
    most = -(-len(tokens) // ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for i in _longest_first(tokens):
        held, rank = heapq.heappop(least)
        hands[rank].append(i)
        if len(hands[rank]) < most:
            heapq.heappush(least, (held + tokens[i], rank))
    return [sorted(items) for items in hands]


def imbalance(tokens: Sequence[int]) -> float:
    """How much longer the fullest takes than if all were equal: largest / mean, 1 at best."""
    return max(tokens) * len(tokens) / sum(tokens)


def _longest_first(tokens: Sequence[int]) -> list[int]:
    return sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
