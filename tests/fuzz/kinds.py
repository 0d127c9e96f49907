"""Every kind of file that Stillroom reads: small samples of it, what a hostile writer makes of
damaged bytes, and everything that reads it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tests.fuzz import marks, outside, planted, rollouts, shards
from tests.fuzz.attempt import attempt
from tests.fuzz.mutate import Mutation

Forge = Callable[[bytes], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file.

    Args:
        samples: valid files.
        read: reads a file; any error but a `StillroomError` is a finding.
        forge: the files that a hostile writer makes of damaged bytes.
        mutate: changes a sample.
    """

    samples: Callable[[], list[bytes]]
    read: Callable[[bytes], object]
    mutate: Mutation
    forge: Forge | None = None


KINDS = {
    name: Kind(*parts)
    for module in (marks, rollouts, shards, outside)
    for name, parts in module.KINDS.items()
}
PLANTED = {name: Kind(*parts) for name, parts in planted.KINDS.items()}
"""Kinds that are none: their readers have bugs."""


def fuzz_one(kind: str, data: bytes) -> None:
    """Read bytes as a kind of file, as they are and as a hostile writer would hash them.

    Whatever this raises is a finding: also memory that ran out, though a reader made an error of
    its own of that.
    """
    one = (KINDS | PLANTED)[kind]
    for form in (data, *(one.forge(data) if one.forge else ())):
        attempt(partial(one.read, form))
