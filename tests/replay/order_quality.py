"""How well the replay order mixes rows and what it keeps open, beside a full permutation.

`python -m tests.replay.order_quality` prints the table of `docs/design/replay-order.md`.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, fields

import numpy as np

from stillroom.replay.plan import Plan

BATCH = 64
"""Rows of a step."""
NEAR = 32
"""Rows whose neighbourhood on disk is counted in a step, whatever the plan's block."""
EPOCHS = 4
KEPT = (2_000, 4_000, 6_000, 7_000, 8_000, 12_000)
"""Rows of blocks that are kept in memory, in the second table."""
SETTINGS = ((1, 64), (16, 64), (32, 64), (64, 64), (32, 256), (32, 512), (64, 512))
"""Blocks and windows of the table, in rows."""


@dataclass(frozen=True)
class Quality:
    """What is measured of an order; distances are between the places of neighbours on disk."""

    mean: float
    """Mean distance, in thirds of the rows: 1 for a full permutation."""
    median: float
    """Median distance, of all rows."""
    percentile_5: float
    """A twentieth of the distances are shorter, of all rows."""
    same_step: float
    """Share of neighbours that come in one step."""
    neighbourhoods: float
    """Runs of NEAR neighbouring rows that a step has rows of, mean."""
    correlation: float
    """Rank correlation of the order on disk and that of replay, without its sign; chance alone
    gives about one over the root of the number of blocks."""
    open_rows: float
    """Rows of the blocks that are between their first and their last use, most at once."""
    most_new: float
    """Blocks that a step is the first to need, most after the first tiles."""


def order(plan: Plan, epoch: int) -> np.ndarray:
    """(N,) rows of an epoch."""
    return np.array(plan.rows_of(epoch, 0, plan.rows))


def full_order(rows: int, epoch: int) -> np.ndarray:
    """(N,) rows, permuted without structure."""
    return np.random.default_rng(epoch).permutation(rows)


def quality(rows: np.ndarray, block: int, window: int) -> Quality:
    """Measure one epoch's order."""
    count = len(rows)
    place = np.argsort(rows)
    distance = np.abs(np.diff(place))
    steps = [rows[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH)]
    new, most_open = _blocks_in_use(rows // block)
    lanes = max(1, min(64, count // window))
    return Quality(
        mean=float(distance.mean() / (count / 3)),
        median=float(np.median(distance) / count),
        percentile_5=float(np.percentile(distance, 5) / count),
        same_step=float((np.diff(place // BATCH) == 0).mean()),
        neighbourhoods=float(np.mean([len(np.unique(step // NEAR)) for step in steps])),
        correlation=abs(float(np.corrcoef(place, np.arange(count))[0, 1])),
        open_rows=float(most_open * block),
        most_new=float(max(new[step] for step in range(lanes * window // BATCH, len(steps)))),
    )


def _blocks_in_use(blocks: np.ndarray) -> tuple[Counter[int], int]:
    """New blocks of each step, and blocks in use in one step at most."""
    _, first = np.unique(blocks, return_index=True)
    last = len(blocks) - 1 - np.unique(blocks[::-1], return_index=True)[1]
    begins, ends = first // BATCH, last // BATCH
    change = np.zeros(begins.max() + ends.max() + 2, int)
    np.add.at(change, begins, 1)
    np.add.at(change, ends + 1, -1)
    return Counter(begins.tolist()), int(np.cumsum(change).max())


def times_read(rows: np.ndarray, block: int, kept_rows: int) -> float:
    """How often a block is read in an epoch, mean, where so many rows of blocks are kept, the
    latest used longest."""
    kept: OrderedDict[int, None] = OrderedDict()
    read = 0
    for number in (rows // block).tolist():
        read += number not in kept
        kept[number] = None
        kept.move_to_end(number)
        if len(kept) * block > kept_rows:
            kept.popitem(last=False)
    return read / len(np.unique(rows // block))


def mean_quality(found: list[Quality]) -> Quality:
    """Over epochs; what is a maximum stays one."""
    columns = {f.name: [getattr(one, f.name) for one in found] for f in fields(Quality)}
    largest = ("open_rows", "most_new")
    return Quality(**{n: max(v) if n in largest else float(np.mean(v)) for n, v in columns.items()})


def main() -> None:
    """Print both tables."""
    print("| N | block / window | mean | median | 5 % | same step | neighbourhoods | correlation"
          " | open rows | most new |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for rows in (5_000, 100_000):
        for block, window in SETTINGS:
            plan = Plan(rows, 0, block, window)
            own = [quality(order(plan, epoch), block, window) for epoch in range(EPOCHS)]
            print(_line(rows, f"{block} / {window}", mean_quality(own)))
        full = [quality(full_order(rows, epoch), 32, 64) for epoch in range(EPOCHS)]
        print(_line(rows, "full permutation", mean_quality(full)))
    print("\n| block / window | " + " | ".join(f"{kept:,} rows" for kept in KEPT) + " |")
    print("|---" * (len(KEPT) + 1) + "|")
    for block, window in ((16, 64), (32, 64), (64, 64), (32, 32), (32, 128)):
        rows_of_epoch = order(Plan(100_000, 0, block, window), 0)
        often = [times_read(rows_of_epoch, block, kept) for kept in KEPT]
        print(f"| {block} / {window} | " + " | ".join(f"{n:.2f}" for n in often) + " |")


def _line(rows: int, name: str, found: Quality) -> str:
    return (
        f"| {rows:,} | {name} | {found.mean:.3f} | {found.median:.3f} | {found.percentile_5:.4f} "
        f"| {found.same_step:.2%} | {found.neighbourhoods:.1f} | {found.correlation:.3f} "
        f"| {found.open_rows:,.0f} | {found.most_new:.0f} |"
    )


if __name__ == "__main__":
    main()
