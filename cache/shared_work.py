"""Work that several processes share: each takes what nobody has claimed, its own share first; in
the end it waits for the others, and takes over what they leave undone."""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stillroom.cache.claims import Claims
from stillroom.cache.workers import ALONE, Worker

LOOK_AFTER_S = (2.0, 30.0)
"""Who waits looks again after the first, and then less and less often, down to the second."""
FULL_LOOK_EVERY = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedWork:
    """Pieces of work, each named by the part that it makes or scores."""

    job: str
    """What is done, for messages."""
    claims: Claims
    """Those of this process."""
    is_left: Callable[[str], bool]
    """Whether a piece is still to be done; asks the storage."""
    do: Callable[[str, Callable[[], None]], None]
    """Does a piece, and calls its second argument at each step forward."""
    worker: Worker = ALONE
    """Whose share comes first."""
    full_look_every: int = FULL_LOOK_EVERY
    """Looks of which one asks for more than claims: whether the work is still to be done at all."""

    def do_free(self, names: Sequence[str]) -> list[str]:
        """Do the pieces that nobody else has claimed; returns those that somebody has."""
        held = []
        for name in self._in_turn(names):
            if not self.is_left(name):
                continue
            if not self.claims.take(name):
                held.append(name)
                continue
            with self.claims.renewed(name) as progress:
                if self.is_left(name):  # its last owner may have done it and let go since
                    self.do(name, progress)
        return held

    def do_all(self, names: Sequence[str]) -> None:
        """Do all pieces, or wait until others have done them."""
        left = self.do_free(names)
        if left:
            what = f"parts that other workers have claimed: {len(left)}, such as {left[0]}"
            print(f"  {self.job}: waiting for {what}", file=sys.stderr, flush=True)
        waits, looks = pauses(), 0
        while left:
            time.sleep(next(waits))
            looks += 1
            if looks % self.full_look_every == 0:
                left = [name for name in left if self.is_left(name)]
            held = {name for name in left if self.claims.is_held(name)}
            free = [name for name in left if name not in held]
            if free:
                again = self.do_free(free)
                waits = pauses() if len(again) < len(free) else waits
                held.update(again)
            left = sorted(held)

    def _in_turn(self, names: Sequence[str]) -> list[str]:
        """This worker's share, and then the rest, both in an order of its own."""
        share = [name for name in names if self.worker.owns(name)]
        rest = [name for name in names if not self.worker.owns(name)]
        return [*self.claims.in_own_order(share), *self.claims.in_own_order(rest)]


def pauses(longest_s: float = LOOK_AFTER_S[1]) -> Iterator[float]:
    """Seconds before each look: up to twice those before the last; drawn, so that workers that
    began to wait together do not all look at once."""
    wait = min(LOOK_AFTER_S[0], longest_s)
    while True:
        yield wait * random.uniform(0.75, 1.0)
        wait = min(2 * wait, longest_s)
