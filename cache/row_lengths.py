"""Parts with rows that are longer than the teacher at hand reads, found before anything is scored:
an engine may have a shorter context than its model."""

import sys
from collections.abc import Sequence

from stillroom.cache.errors import ConfigError, CorruptError, InputError, MissingError
from stillroom.cache.progress import Progress
from stillroom.cache.store import Cache

TOO_LONG = ("refuse", "skip")


class RowLengths:
    """The lengths of a cache's rows against what a teacher reads. Parts are only read where it
    reads at least two tokens less than the cache's model does: a server reads one less at best, and
    a row of just that length shows where it is scored.

    Args:
        cache: where the parts lie.
        longest: tokens of the longest row that the teacher reads; None where it does not tell.
        too_long: what becomes of parts with a longer one: refuse or skip.

    Raises:
        ConfigError: it is neither.
    """

    def __init__(self, cache: Cache, longest: int | None, too_long: str = "refuse") -> None:
        """Read nothing yet."""
        if too_long not in TOO_LONG:
            raise ConfigError("too_long", f"one of {TOO_LONG}", repr(too_long), "Change it.")
        self.skips = too_long == "skip"
        self.too_long: dict[str, int] = {}
        """Parts that were found to have rows that are too long, and how many."""
        self._cache = cache
        self._longest = longest if longest and longest < cache.identity.max_length - 1 else None
        self._fit: set[str] = set()

    def fitting(self, parts: Sequence[str]) -> list[str]:
        """The parts without a row that is too long. Those that cannot be read are among them: that
        shows where they are scored.

        Raises:
            InputError: there are others, and they are not to be skipped; says how many.
        """
        if self._longest is None:
            return list(parts)
        unknown = [p for p in parts if p not in self._fit and p not in self.too_long]
        found = self._read(unknown, self._longest)
        self._fit.update(part for part in unknown if part not in found)
        if found and not self.skips:
            raise _refusal(found, self._longest)
        if found:
            said = f"{len(found)} parts are left out, such as {next(iter(found))}: "
            said += f"{sum(found.values()):,} rows have over {self._longest} tokens"
            print(f"  score: {said}", file=sys.stderr, flush=True)
        self.too_long |= found
        return [part for part in parts if part not in self.too_long]

    def _read(self, parts: Sequence[str], longest: int) -> dict[str, int]:
        found = {}
        with Progress("lengths of rows", len(parts), "parts") as progress:
            for part in parts:
                progress.advance()
                try:
                    count = int((self._cache.row_lengths(part) > longest).sum())
                except (CorruptError, MissingError):
                    continue
                if count:
                    found[part] = count
        return found


def _refusal(found: dict[str, int], longest: int) -> InputError:
    got = (
        f"{sum(found.values()):,} longer ones in {len(found):,} parts, such as {next(iter(found))}"
    )
    do = (
        "Give the engine a longer context (max_model_len), or leave these parts unscored with "
        "--too-long skip."
    )
    return InputError("rows to score", f"at most {longest} tokens, as the teacher reads", got, do)
