"""One process alone is the first rank and every rank; several are tested where they start."""

from __future__ import annotations

import pytest

from stillroom.cache.errors import CorruptError
from stillroom.train.ranks import from_every_rank, from_first_rank, rank


def test_one_process() -> None:
    assert rank() == 0
    assert from_first_rank(lambda: 3) == 3
    assert from_every_rank({"a": 1}) == [{"a": 1}]


def test_an_error_of_the_first_rank_is_everyones() -> None:
    def choose() -> None:
        raise CorruptError("a", "b", "c", "d")

    with pytest.raises(CorruptError, match="expected b"):
        from_first_rank(choose)
