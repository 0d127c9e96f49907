"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 20.0


class Progress:
    """Counts units of work.

    Args:
        label: what is being done.
        total: units in all.
        unit: name of one unit, plural.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        """Nothing is shown before the first unit."""
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._start = self._printed = self._last = time.monotonic()
        tty = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=False) if tty else None

    def advance(self, amount: int = 1) -> None:
        """Count finished units."""
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() - self._printed > LINE_EVERY_S and self._done:
            self._print_line()
        self._done += amount
        self._last = time.monotonic()

    def _print_line(self) -> None:
        """Print how things stood after the last unit: the one at hand may be the first of many."""
        self._printed = time.monotonic()
        elapsed = self._last - self._start
        left = elapsed / self._done * (self._total - self._done)
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        rate = self._done / elapsed
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        print(f"  {self._label}: {done}, {shown}/s, {left:.0f} s left", file=sys.stderr)

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
