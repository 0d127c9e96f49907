"""The score job as a service: whatever arrives is scored, by a teacher that stays loaded, until the
process is told to end."""

import sys
import time

from stillroom.cache.score import Scorer
from stillroom.cache.shared_work import pauses


def watch(scorer: Scorer, longest_pause_s: float) -> None:
    """Score every part that has no shard, and every one that comes, for ever.

    Where nothing is free, the storage is looked at less and less often until something is. Parts
    that other workers have claimed are looked at again like new ones. A part that cannot be scored
    is left out until another process watches; rows that are longer than the teacher reads are
    refused only if they are there at the beginning.

    Args:
        scorer: what scores.
        longest_pause_s: longest time between two looks, seconds; > 0.

    Raises:
        KeyboardInterrupt: the process was told to end; the part at hand is let go.
        InputError: rows that are there are too long.
        StillroomError: as `Scorer.score_free`.
    """
    waits, waiting = pauses(longest_pause_s), False
    held: set[str] = set()
    scorer.fitting(scorer.cache.unscored())
    while True:
        left_out = scorer.failed.keys() | scorer.report.too_long
        parts = [part for part in scorer.cache.unscored() if part not in left_out]
        free = [part for part in parts if part not in held or not scorer.claims.is_held(part)]
        left = scorer.score_free(free)
        held = {*parts}.difference(free).union(left)
        if len(left) < len(free):
            waits, waiting = pauses(longest_pause_s), False
            continue
        if not waiting:
            others = f"; other workers have claimed {len(held)}" if held else ""
            print(f"  score: waiting for new parts{others}", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(next(waits))
