"""The study's table says what the curves say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillroom.tools.bench_quality_cells import Cell, Study
from stillroom.tools.bench_quality_report import (
    as_json,
    draw,
    lines_of,
    print_report,
    reached_after,
)

STUDY = Study(seeds=(0, 1))


def curve(seconds: float, *own: float) -> list[dict[str, Any]]:
    """Measurements `seconds` apart, with these distances on the student's own text."""
    return [
        {
            "updates": 12 * i,
            "wall_s": seconds * i,
            "cpu_s": 2 * seconds * i,
            "teacher_positions": 100 * i,
            "student": {"forward_kl_nats": kl, "reverse_kl_nats": 2 * kl, "tail_mass": 0.1 * i},
            "teacher": {"forward_kl_nats": 3 * kl, "reverse_kl_nats": 4 * kl, "tail_mass": 0.0},
        }
        for i, kl in enumerate(own)
    ]


CURVES = {
    Cell("trl", 0, "forward", 0): curve(10, 4, 2, 1),
    Cell("trl", 0, "forward", 1): curve(10, 4, 4, 3),
    Cell("replay", 16, "forward", 0): curve(4, 4, 2, 0.5),
    Cell("replay", 16, "forward", 1): curve(4, 4, 2, 2.5),
    Cell("replay", 4, "forward", 0): curve(4, 4, 3, 2.5),
    Cell("shuffled", 16, "forward", 0): curve(4, 4, 6, 8),
    Cell("replay", 16, "reverse_truncated", 0): curve(4, 4, 6, 8),
    Cell("replay", 16, "reverse", 1): curve(4, 4, 6, 8),
}


def test_the_table_has_means_over_seeds() -> None:
    trl, replay, *rest = lines_of(STUDY, CURVES)
    assert (trl.method, trl.objective, trl.seeds, trl.reuse) == ("trl", "forward", 2, None)
    assert (trl.own_forward_nats, trl.own_reverse_nats) == (2, 4)
    assert (trl.teacher_forward_nats, trl.teacher_reverse_nats) == (6, 8)
    assert (trl.wall_s, trl.cpu_s, trl.teacher_positions) == (20, 40, 200)
    assert (trl.own_spread_nats, trl.teacher_spread_nats) == (2, 6)
    assert (replay.method, replay.reuse, replay.own_forward_nats) == ("replay-16", 2, 1.5)
    assert [line.objective for line in rest][-2:] == ["reverse", "reverse_truncated"]


def test_time_is_compared_where_both_curves_are_where_trls_ends() -> None:
    shares = {
        (line.method, line.objective): line.share_of_trl_wall for line in lines_of(STUDY, CURVES)
    }
    assert shares["trl", "forward"] is None
    assert shares["replay-16", "forward"] == pytest.approx(4 / 20)
    assert shares["replay-4", "forward"] is None
    assert shares["shuffled-16", "forward"] is None
    assert shares["replay-16", "reverse"] is None
    assert shares["replay-16", "reverse_truncated"] is None


def test_shares_are_of_either_text() -> None:
    curves = {cell: [dict(point) for point in points] for cell, points in CURVES.items()}
    for point in curves[Cell("replay", 16, "forward", 0)]:
        point["teacher"] = {**point["teacher"], "forward_kl_nats": 9.0}
    (line,) = (x for x in lines_of(STUDY, curves) if (x.method, x.seeds) == ("replay-16", 2))
    assert line.share_of_trl_cpu == line.share_of_trl_wall == pytest.approx(4 / 20)
    assert line.share_of_trl_cpu_teacher is None


def test_reverse_over_buckets_is_compared_with_trls_reverse() -> None:
    curves = {
        Cell("trl", 0, "reverse", 0): curve(10, 4, 2, 1),
        Cell("replay", 16, "reverse_tail", 0): curve(4, 4, 1, 3),
    }
    _, line = lines_of(STUDY, curves)
    assert line.share_of_trl_wall == pytest.approx(4 / 20)
    both = curves | {Cell("replay", 16, "reverse_tail", 1): curve(4, 4, 1, 5)}
    assert lines_of(STUDY, both)[1].own_spread_nats == 2 * (5 - 3)


def test_a_curve_reaches_a_value_between_its_points() -> None:
    assert reached_after([0, 10, 20], [4, 2, 1], 3) == 5
    assert reached_after([0, 10, 20], [4, 2, 1], 1) == 20
    assert reached_after([0, 10, 20], [4, 5, 3], 4.5) == 0
    assert reached_after([0, 10], [4, 2], 1) is None


def test_it_prints_and_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(STUDY, CURVES)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + 6
    assert "replay-16" in out
    value = as_json(STUDY, CURVES)
    assert len(value["table"]) == 6
    assert value["curves"]["trl.forward.0"][2]["wall_s"] == 20
    print_report(STUDY, {})
    assert "no cell" in capsys.readouterr().out


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = draw(CURVES, tmp_path / "docs")
    assert svg.read_text().count("<svg") == 1
    assert png.read_bytes().startswith(b"\x89PNG")
