"""Token ids of a shard as small codes: positions are put into groups of like tokens, and an id is
coded by its place in its group's list, or else in the list of all ids.

    id = group_list[group, code]        if code < W
         common_list[code - W]          otherwise

Both lists are sorted by frequency, so codes are small numbers where a distribution is peaked, which
is what PCodec's bins need. The group of a position is found from its first entries alone
(a mixture of G multinomials, fitted with hard assignments to a sample of positions, in integers, so
that equal ids give equal codes on every machine).
"""

from dataclasses import dataclass

import numpy as np

from stillroom.cache.errors import ShapeError

MAX_GROUPS = 16
MAX_LOOKUP = 1 << 23
"""Most codes of all groups, G x (W + number of distinct ids): a writer has a table of them."""
SAMPLE = 4096
LEADING = 8
ROUNDS = 6
FEATURES = 2048
PRIOR = 300.0
SCALE = 256


@dataclass(frozen=True, slots=True)
class GroupedIds:
    """Codes of (P, K) ids."""

    code: np.ndarray
    """(P, K) uint32."""
    group: np.ndarray
    """(P,) uint16, below G."""
    id_list: np.ndarray
    """(G * W + R,) uint32: G lists of W ids (short ones filled up with 0), then all R ids."""
    group_width: int
    """W; 0 where there is one group only."""

    @property
    def groups(self) -> int:
        """G."""
        return int(self.group.max(initial=0)) + 1


def group_ids(ids: np.ndarray) -> GroupedIds:
    """Code ids, (P, K) uint32; 2^32 - 1 stands for an unused entry.

    Raises:
        ShapeError: there are more different ids than a reader takes.
    """
    rank, common = _ranks(ids)
    groups, width = _sizes(len(ids), len(common))
    if groups == 1:
        return GroupedIds(rank.astype(np.uint32), np.zeros(len(ids), np.uint16), common, 0)
    group = _assign(rank, groups)
    used, group = np.unique(group, return_inverse=True)
    lists, lookup = _group_lists(rank, group, len(used), len(common), width)
    code, flat = np.empty(rank.shape, np.uint32), lookup.ravel()
    for start in range(0, len(rank), SAMPLE):
        rows = slice(start, start + SAMPLE)
        index = rank[rows] + group[rows, None] * len(common)
        np.take(flat, index, out=code[rows], mode="wrap")
    id_list = np.concatenate([np.where(lists >= 0, common[lists], 0).ravel(), common])
    return GroupedIds(code, group.astype(np.uint16), id_list.astype(np.uint32), width)


class IdLookup:
    """Ids of codes.

    Args:
        id_list: (G * W + R,) uint32; see `GroupedIds`.
        groups: G.
        width: W.
    """

    def __init__(self, id_list: np.ndarray, groups: int, width: int) -> None:
        """Turn the lists, so that the last group's comes first and its codes are their places."""
        self.groups, self.codes = groups, len(id_list) - (groups - 1) * width
        self._ids, self._width = np.roll(id_list, -(groups - 1) * width), np.uint32(width)

    def look_up(
        self, code: np.ndarray, group: np.ndarray, out: np.ndarray, index: np.ndarray
    ) -> bool:
        """Write the ids of (rows, K) codes, of positions in groups (rows, 1 or K); or return False
        where some are not in the lists. Codes and `index`, int64 of their shape, are overwritten:
        np.take makes such indices in new memory, which takes up to a third of the time."""
        if code.max(initial=0) >= self.codes or group.max(initial=0) >= self.groups:
            return False
        own_list = (self.codes + group.astype(np.uint32) * self._width) % np.uint32(len(self._ids))
        np.subtract(code, self._width, out=out)
        out >>= np.uint32(31)  # 1 where a code is in its group's own list
        out *= own_list
        code += out
        index[...] = code
        # the check above leaves nothing to clip; this mode spares a buffer
        np.take(self._ids, index, out=out, mode="clip")
        return True


def _ranks(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each id's place in the list of all ids by falling frequency, and that list."""
    shifted: np.ndarray = ids + np.uint32(1)  # an unused entry becomes 0
    values: np.ndarray | None = None
    if shifted.max(initial=0) >= MAX_LOOKUP:  # too large to be counted by value
        values, shifted = np.unique(shifted, return_inverse=True)
    count = np.bincount(shifted.ravel())
    seen = np.flatnonzero(count)
    if len(seen) > MAX_LOOKUP:
        do = "Make smaller parts."
        raise ShapeError("column 'topk_id'", f"at most {MAX_LOOKUP} ids", f"{len(seen)}", do)
    order = seen[np.argsort(-count[seen], kind="stable")]
    rank_of = np.zeros(len(count), np.int32)
    rank_of[order] = np.arange(len(order))
    common = (order if values is None else values[order]).astype(np.uint32) - np.uint32(1)
    return rank_of.take(shifted), common


def _sizes(positions: int, distinct: int) -> tuple[int, int]:
    """G and W for which lists and codes together are near their smallest on real scores."""
    width = 512 if positions < 40_000 else 1024
    wanted = min(MAX_GROUPS, positions * 8 // 5 // width)
    groups = 1 << max(0, wanted.bit_length() - 1)
    while groups > 1 and groups * (width + distinct) > MAX_LOOKUP:
        groups //= 2
    return (groups, width) if groups > 1 else (1, 0)


def _assign(rank: np.ndarray, groups: int) -> np.ndarray:
    """(P,) int64: the group that makes each position's first entries likeliest."""
    sample = np.minimum(rank[:: max(1, len(rank) // SAMPLE)], FEATURES)
    leading = sample[:, :LEADING]
    base = np.bincount(sample.ravel(), minlength=FEATURES + 1) + 1.0
    base /= base.sum()
    group = leading[:, 0].astype(np.int64) % groups
    for _ in range(ROUNDS):
        gain = _gains(sample, group, groups, base)
        group = gain.take(leading, axis=0).sum(axis=1).argmax(axis=1)
    out = np.empty(len(rank), np.int64)
    for start in range(0, len(rank), SAMPLE):
        block = np.minimum(rank[start : start + SAMPLE, :LEADING], FEATURES)
        out[start : start + SAMPLE] = gain.take(block, axis=0).sum(axis=1).argmax(axis=1)
    return out


def _gains(sample: np.ndarray, group: np.ndarray, groups: int, base: np.ndarray) -> np.ndarray:
    """(FEATURES + 1, G) int32: log likelihood of a rank in a group over that in all, scaled."""
    cells = group[:, None] * (FEATURES + 1) + sample
    count = np.bincount(cells.ravel(), minlength=groups * (FEATURES + 1))
    count = count.reshape(groups, FEATURES + 1)
    share = (count + base * PRIOR) / (count.sum(axis=1, keepdims=True) + PRIOR)
    gain = np.round(SCALE * np.log(share / base)).astype(np.int32)
    gain[:, FEATURES] = 0
    return np.ascontiguousarray(gain.T)


def _group_lists(
    rank: np.ndarray, group: np.ndarray, groups: int, distinct: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lists (G, W) of ranks, -1 where short, and the code (G, R) of every rank in every group."""
    cells = rank + (group * distinct).astype(rank.dtype)[:, None]
    count = np.bincount(cells.ravel(), minlength=groups * distinct).reshape(groups, distinct)
    lists = np.full((groups, width), -1, np.int64)
    lookup = np.tile(np.arange(width, width + distinct, dtype=np.uint32), (groups, 1))
    for number, own in enumerate(count):
        often = np.flatnonzero(own >= 2)
        often = often[np.argsort(-own[often], kind="stable")][:width]
        lists[number, : len(often)] = often
        lookup[number, often] = np.arange(len(often), dtype=np.uint32)
    return lists, lookup
