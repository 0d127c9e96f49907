"""Cross-entropy that would apply to no row of a stream is refused, whatever hides its rows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import MismatchError
from stillroom.cache.schema import SOURCES
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Feed, Source
from stillroom.replay.row_filter import RowFilter
from stillroom.train.crossed import check_crossed
from stillroom.train.objective import Objective
from tests.cache.fakes import commit_shard, make_identity, random_arrays


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two shards of six rows, all of a student but the longest."""
    cache = Cache.create(tmp_path_factory.mktemp("cache"), make_identity())
    for number in range(2):
        arrays = random_arrays(number, 30, 6)
        arrays["source"][:] = SOURCES.index("student")
        if number == 1:
            longest = int(np.diff(arrays["sequence_start"]).argmax())
            arrays["source"][longest] = SOURCES.index("teacher")
        commit_shard(cache, arrays, number)
    return cache


def feed(cache: Cache, max_tokens: int = 1000, **rows: Any) -> Feed:
    """Its rows, or those that a filter keeps."""
    config = StreamConfig(rows=RowFilter(**rows), max_tokens=max_tokens, over_long="skip")
    return Feed(Source(cache, cache.snapshot()), 0, config)


def crossed(*sources: str) -> Objective:
    """Half of it cross-entropy."""
    return Objective(cross_entropy=0.5, cross_entropy_sources=sources)


def test_rows_of_other_sources_alone_are_refused(cache: Cache) -> None:
    check_crossed([feed(cache)], crossed("student"))
    check_crossed([feed(cache)], crossed("import", "student"))
    check_crossed([feed(cache)], Objective(cross_entropy=0.5))
    with pytest.raises(MismatchError, match=r"train\.cross_entropy: expected rows of import"):
        check_crossed([feed(cache)], crossed("import"))


def test_rows_that_are_not_replayed_do_not_count(cache: Cache) -> None:
    """The teacher's only row is left out by a filter, or for its length."""
    longest = int(cache.snapshot().commits[1].row_lengths()[:, 0].max())
    hidden = [feed(cache, sources=("student",)), feed(cache, max_tokens=longest - 1)]
    check_crossed([*hidden, feed(cache)], crossed("teacher"))
    for feeds in ([hidden[0]], [hidden[1]], hidden):
        with pytest.raises(MismatchError, match=r"0\.5, and no such row"):
            check_crossed(feeds, crossed("teacher"))


def test_without_cross_entropy_nothing_is_looked_at() -> None:
    unread: Any = SimpleNamespace()
    check_crossed([unread], Objective())
