"""What a scoring job still has before it, said beside the progress of the part at hand: parts and
time, and what the teacher tells of itself."""

from collections.abc import Iterable

from stillroom.cache.progress import duration
from stillroom.cache.teacher import Teacher, stats_of

TOLD = {"tokens_in_flight": "tokens in flight", "servers": "servers", "retries": "retries"}


class Outlook:
    """The parts that are left, as far as this process knows.

    Parts that were not read yet are taken to be as large as those that were, and to be scored here:
    where others help, the time is the most that it takes.

    Args:
        teacher: who scores them.
    """

    def __init__(self, teacher: Teacher) -> None:
        """Nothing is left yet."""
        self._teacher = teacher
        self._left: set[str] = set()
        self._parts = self._positions = 0

    def expect(self, parts: Iterable[str]) -> None:
        """These are to be scored."""
        self._left.update(parts)

    def begin(self, positions: int) -> None:
        """A part is read; it has so many."""
        self._parts += 1
        self._positions += positions

    def drop(self, part: str) -> None:
        """A part is scored, by whomever."""
        self._left.discard(part)

    def text(self, left: int, rate: float) -> str:
        """What follows a line of progress.

        Args:
            left: positions of the part at hand.
            rate: positions a second.
        """
        told = stats_of(self._teacher)
        said = [f"{told[name]:,.0f} {what}" for name, what in TOLD.items() if told.get(name)]
        others = len(self._left) - 1
        if others > 0:
            mean = self._positions / max(self._parts, 1)
            whole = duration((left + others * mean) / rate)
            said.insert(0, f"all {others + 1:,} parts at most {whole}")
        return "".join(f"; {one}" for one in said)
