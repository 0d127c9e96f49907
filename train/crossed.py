"""Whether cross-entropy is taken on any row of a stream, seen before training."""

from collections.abc import Sequence

import numpy as np

from stillroom.cache.errors import InputError, MismatchError
from stillroom.replay.feed import Feed
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.selection import select
from stillroom.train.objective import Objective

ANY_LENGTH = 1 << 31


def check_crossed(feeds: Sequence[Feed], objective: Objective) -> None:
    """Refuse cross-entropy on rows that are all of other sources: it would only take weight from
    the rest of the loss. Nothing is read for an objective without it.

    Args:
        feeds: of a stream, opened.
        objective: what is minimised on its rows.

    Raises:
        MismatchError: no row is of a source that cross-entropy is taken on.
    """
    share, sources = objective.cross_entropy, objective.cross_entropy_sources
    if share and not any(_has(feed, sources) for feed in feeds):
        expected = f"rows of {' or '.join(sources)}, as train.cross_entropy_sources says"
        do = "Set it to 0, replay such rows too, or name the sources that there are."
        raise MismatchError("train.cross_entropy", expected, f"{share}, and no such row", do)


def _has(feed: Feed, sources: tuple[str, ...]) -> bool:
    """Whether any row that a feed replays is of these sources."""
    cache, snapshot = feed.source.cache, feed.source.snapshot
    try:
        found = select(cache, snapshot, RowFilter(sources=sources), max_tokens=ANY_LENGTH)
    except InputError:
        return False
    return bool(np.isin(found.rows, feed.selection.rows).any())
