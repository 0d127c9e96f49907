"""A scorer in a process of its own: `python -m tests.cache.scorer_child ROOT GATE [RANK SIZE]`
or `... ROOT GATE watch`.

Says "ready", waits for a line, scores what is not scored, and prints what it scored and lost as
JSON. Its teacher answers for a part only once the file GATE exists. The variable STALLED_AFTER_S
sets for how long it may hang. One that watches goes on until SIGTERM.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from stillroom.cache import claims
from stillroom.cache.score import Scorer, score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec
from stillroom.cache.watch import watch
from stillroom.cache.workers import Worker
from stillroom.tools.ending import ends_when_told
from tests.cache.crash_child import no_fsync
from tests.cache.fakes import FakeTeacher

RENEW_EVERY_S = 0.02


class GatedTeacher(FakeTeacher):
    """A teacher that waits for a file, but not for the canary."""

    def __init__(self, gate: str) -> None:
        """Draw the table."""
        super().__init__()
        self.gate, self.calls = gate, 0

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        self.calls += 1
        while self.calls > 1 and not os.path.exists(self.gate):
            time.sleep(0.005)
        yield from super().score(rows, spec)


def main(root: str, gate: str, *which: str) -> None:
    """Score a cache."""
    claims.RENEW_EVERY_S, os.fsync = RENEW_EVERY_S, no_fsync
    claims.STALLED_AFTER_S = float(os.environ.get("STALLED_AFTER_S", claims.STALLED_AFTER_S))
    cache, teacher = Cache.open(root), GatedTeacher(gate)
    print("ready", flush=True)
    sys.stdin.readline()
    if which == ("watch",):
        scorer = Scorer(cache, teacher)
        with ends_when_told(), suppress(KeyboardInterrupt):
            watch(scorer, 0.05)
        report = scorer.report
    else:
        rank, world_size = map(int, which or (0, 1))
        report = score(cache, teacher, worker=Worker(rank=rank, world_size=world_size))
    print(json.dumps({"scored": report.scored, "lost": report.lost}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
