"""Pace: sums over steps, ranks and resumed parts, and what they say."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.train.callbacks import StepOutcome
from stillroom.train.pace import PaceCallback, peak_bytes, teacher_s_per_position


def step(number: int, positions: int = 50) -> StepOutcome:
    """A step of 2 s, of which 0.5 s went by waiting."""
    micro: Any = SimpleNamespace(micro=SimpleNamespace(num_positions=positions))
    return StepOutcome(
        step=number,
        epoch=0,
        loss=1.0,
        gradient_norm=1.0,
        learning_rate=0.1,
        num_positions=positions,
        rows=4,
        micro=(micro,),
        wait_s=0.5,
        compute_s=1.5,
        tokens=200,
        forward_tokens=150,
        padded_tokens=400,
    )


def commit(positions: int, teacher_s: float) -> Any:
    """As much of a commit as is looked at."""
    return SimpleNamespace(positions=positions, teacher_s=teacher_s)


def test_what_a_run_reports() -> None:
    """Rates over wall time, shares, and the teacher's time for what was replayed; also where a
    checkpoint lies between the steps."""
    logged: dict[str, float] = {}
    commits = [commit(100, 4.0), commit(300, 12.0)]
    feed = SimpleNamespace(source=SimpleNamespace(snapshot=SimpleNamespace(commits=commits)))
    trainer: Any = SimpleNamespace(log=logged.update, stream=SimpleNamespace(feeds=(feed,)))
    callback = PaceCallback()
    callback.on_step(trainer, step(1))
    resumed = PaceCallback()
    resumed.load_state_dict(jsonfile.load(jsonfile.dump(callback.state_dict()), "x"))
    resumed.on_step(trainer, step(2))
    report: Any = SimpleNamespace(pace={})
    resumed.on_end(trainer, report)
    peaks = {name: report.pace.pop(name) for name in peak_bytes()}
    elsewhere = replace(step(3), replayed=False)
    resumed.on_step(trainer, elsewhere)
    assert resumed._sums.replayed == 100
    assert report.pace == pytest.approx(
        {
            "tokens_per_s": 100.0,
            "positions_per_s": 25.0,
            "waiting_share": 0.25,
            "padding_saved": 0.5,
            "shared_prompts_saved": 0.25,
            "teacher_s_replayed": 100 * 16 / 400,
        }
    )
    assert all(value > 1 << 20 for value in peaks.values())
    assert logged["pace/waiting_share"] == 0.25
    assert logged.keys() >= {f"pace/{name}" for name in peaks}


def test_without_shards_or_seconds() -> None:
    """Nothing replayed, nothing scored: no division by zero."""
    assert teacher_s_per_position([]) == 0
    assert PaceCallback()._sums.summary()["tokens_per_s"] == 0


def test_another_state_is_refused() -> None:
    with pytest.raises(CorruptError, match="pace in a checkpoint"):
        PaceCallback().load_state_dict({"tokens": 3})
