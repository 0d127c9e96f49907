"""Adds scored parts to a cache and retires its oldest ones, until a file says stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from stillroom.cache.store import Cache
from tests.replay.conftest import add_scored_part

KEPT = 4


def main() -> None:
    """Arguments: root, and the file that says stop."""
    root, stop = sys.argv[1:]
    cache = Cache.open(root)
    live = cache.parts()
    unit = len(live)
    while not Path(stop).exists():
        live.append(add_scored_part(cache, unit, unit, 5 + unit % 7))
        if len(live) > KEPT:
            cache.retire(live.pop(0), "old")
        unit += 1
        time.sleep(0.1)


if __name__ == "__main__":
    main()
