"""Columns of shards: each read once where it is kept, and counts of a mask's spans."""

from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.replay.shard_columns import UNCOUNTED, Known, ShardColumns

NAMES = ["source", "rollout_id"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Columns of each read from now on."""
    found: list[list[str]] = []
    read_ranges = Shard.read_ranges

    def noted(shard: Shard, wanted: Any) -> Any:
        wanted = list(wanted)
        found.append([name for name, _, _ in wanted])
        return read_ranges(shard, wanted)

    monkeypatch.setattr(Shard, "read_ranges", noted)
    return found


def test_what_is_known_is_not_read_again(scored_cache: Cache, read: list[list[str]]) -> None:
    known: Known = {}
    snapshot = scored_cache.snapshot()
    first = ShardColumns(scored_cache, snapshot, known).read(1, NAMES)
    again = ShardColumns(scored_cache, snapshot, known)
    second = again.read(1, [*NAMES, "prompt_id"])
    assert read == [NAMES, ["prompt_id"]]
    assert again.read(1, ["prompt_id"])["prompt_id"].tolist() == second["prompt_id"].tolist()
    assert list(known) == [snapshot.commits[1].digest()]
    stored = scored_cache.shard(snapshot.commits[1]).all_rows()
    for name in NAMES:
        assert first[name].tolist() == second[name].tolist() == stored[name].tolist()


def test_nothing_is_kept_unless_asked_for(scored_cache: Cache, read: list[list[str]]) -> None:
    columns = ShardColumns(scored_cache, scored_cache.snapshot(), None)
    columns.read(0, NAMES)
    columns.read(0, NAMES)
    assert read == [NAMES, NAMES]


def test_scored_tokens_are_counted_in_spans(scored_cache: Cache) -> None:
    snapshot = scored_cache.snapshot()
    arrays = scored_cache.shard(snapshot.commits[2]).all_rows()
    start = arrays["sequence_start"].astype(int)
    spans = np.stack([start[:-1] + 2, start[1:]], axis=1)
    columns = ShardColumns(scored_cache, snapshot, None)
    rows = np.array([7, 1, 4])
    columns.count(2, rows, spans[rows])
    found = columns.counted(2)
    assert [found[row] for row in rows] == [
        np.count_nonzero(arrays["scored"][a:b]) for a, b in spans[rows]
    ]
    assert (np.delete(found, rows) == UNCOUNTED).all()


def test_what_is_no_column_with_a_number_a_row_is_refused(scored_cache: Cache) -> None:
    known: Known = {}
    columns = ShardColumns(scored_cache, scored_cache.snapshot(), known)
    with pytest.raises(InputError, match="x_advantage: expected one number a sequence"):
        columns.read(0, ["source", "x_advantage"])
    with pytest.raises(InputError, match=r"expected a column 'x_none'; got .*x_weight"):
        columns.read(0, ["x_none"])
    assert not known[scored_cache.snapshot().commits[0].digest()].columns
