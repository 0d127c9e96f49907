"""The study's settings, its cells and their names."""

from __future__ import annotations

from collections import Counter

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.tools.bench_only import chosen
from stillroom.tools.bench_quality_cells import Cell, Study, cells_of

STUDY = Study()
CELLS = list(cells_of(STUDY))


def test_every_method_objective_and_seed_has_one_cell() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 48
    by_way = Counter(cell.way for cell in CELLS)
    assert by_way == {
        "trl": 9,
        "replay-4": 9,
        "replay-16": 15,
        "replay-64": 9,
        "grouped-16": 3,
        "shuffled-16": 3,
    }
    assert {cell.seed for cell in CELLS[:16]} == {0}


def test_patterns_choose_cells() -> None:
    names = [cell.name for cell in chosen(CELLS, ["replay-16.f*.0", "trl.jsd.?"])]
    assert sorted(names) == ["replay-16.forward.0", "trl.jsd.0", "trl.jsd.1", "trl.jsd.2"]
    assert chosen(CELLS, []) == CELLS
    with pytest.raises(ConfigError, match="replay-5"):
        chosen(CELLS, ["trl.*", "replay-5.*"])


def test_no_more_rows_are_sampled_than_are_replayed() -> None:
    assert [STUDY.rows_of(n) for n in (4, 16, 64)] == [16, 32, 32]
    assert [STUDY.reuse_of(n) for n in (4, 16, 64)] == [1, 2, 4]
    assert Cell("trl", 0, "forward", 1).name == "trl.forward.1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("updates", 0),
        ("eval_every", 7),
        ("intervals", ()),
        ("intervals", (0,)),
        ("seeds", (-1,)),
        ("learning_rate", 0.0),
        ("threads", 0),
        ("refresh_rows", 3),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Study(**{name: value})  # type: ignore[arg-type]
