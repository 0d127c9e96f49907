"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 20.0
UNITS_S = (("h", 3600.0, 7200.0), ("min", 60.0, 600.0))
"""Each with its seconds, and from how many on a time is given in it."""


class Progress:
    """Counts units of work.

    Args:
        label: what is being done.
        total: units in all.
        unit: name of one unit, plural.
        more: what to say after that, given the units that are left and their rate a second.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        more: Callable[[int, float], str] = lambda left, rate: "",
    ) -> None:
        """Nothing is shown before the first unit."""
        self._label, self._total, self._unit = label, total, unit
        self._more = more
        self._done = 0
        self._start = self._printed = self._last = time.monotonic()
        tty = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False) if tty else None

    def advance(self, amount: int = 1) -> None:
        """Count finished units."""
        waited = time.monotonic() - self._printed > LINE_EVERY_S
        if self._bar is not None:
            self._bar.update(amount)
        elif waited and self._done:
            self._print_line()
        self._done += amount
        self._last = time.monotonic()
        if self._bar is not None and waited:
            self._printed = self._last
            self._bar.set_postfix_str(self._more(*self._left()).lstrip("; "))

    def _left(self) -> tuple[int, float]:
        """Units that are left, and the rate so far, a second."""
        return self._total - self._done, self._done / max(self._last - self._start, 1e-9)

    def _print_line(self) -> None:
        """Print how things stood after the last unit: the one at hand may be the first of many."""
        self._printed = time.monotonic()
        left, rate = self._left()
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        line = f"  {self._label}: {done}, {shown}/s, {duration(left / rate)} left"
        print(f"{line}{self._more(left, rate)}", file=sys.stderr)

    def __enter__(self) -> "Progress":
        """Start counting."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A time for people, such as 3.2 h, 12 min or 41 s."""
    for name, unit, least in UNITS_S:
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
