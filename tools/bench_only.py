"""`--only`: which of a benchmark's named figures are measured."""

import fnmatch
from collections.abc import Sequence
from typing import Protocol, TypeVar

from stillroom.cache.errors import ConfigError


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """As the tables have it."""


N = TypeVar("N", bound=Named)


def chosen(found: Sequence[N], patterns: Sequence[str]) -> list[N]:
    """Those whose names match one of the patterns, such as 'replay-16.*.0'; all without any.

    Raises:
        ConfigError: a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter([one.name for one in found], pattern):
            do = f"Name some like {found[0].name!r}, with * for any text."
            raise ConfigError("only", "a pattern of names", repr(pattern), do)
    return [
        one
        for one in found
        if not patterns or any(fnmatch.fnmatchcase(one.name, p) for p in patterns)
    ]
