"""What a run did is known by the very policy that it published; unfinished runs are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.pins import pin
from stillroom.cache.storage import Storage
from stillroom.replay.policies import Policy, put_policy
from stillroom.train.checkpoint import checkpoints_of, newest_checkpoint
from stillroom.train.config import ReplayConfig
from stillroom.train.outcome import (
    OUTCOME,
    keep_outcome,
    published_outcome,
    release_run,
    unfinished_policy,
)
from stillroom.train.phases import Phase
from stillroom.train.run_snapshot import pin_name

POLICY = Policy(version=1, run="r", parent=0, step=3, path="/student", fingerprint="0" * 32)
VALUES = {"steps": 3, "pace": {"tokens_per_s": 0.5}}


def test_only_the_very_policy_counts(tmp_path: Path) -> None:
    """Not another run's of the same number, nor the same run's with other weights."""
    storage = Storage(tmp_path / "root")
    assert published_outcome(storage, tmp_path, "r-000000") is None
    keep_outcome(tmp_path, "r-000000", POLICY, VALUES)
    assert published_outcome(storage, tmp_path, "r-000000") is None, "announced, not published"
    put_policy(storage, POLICY)
    assert published_outcome(storage, tmp_path, "r-000000") == (POLICY, VALUES)
    keep_outcome(tmp_path, "r-000000", replace(POLICY, fingerprint="1" * 32), VALUES)
    assert published_outcome(storage, tmp_path, "r-000000") is None
    (checkpoints_of(tmp_path, "r-000000") / OUTCOME).write_bytes(b"{}")
    with pytest.raises(CorruptError, match="r-000000"):
        published_outcome(storage, tmp_path, "r-000000")


def test_unfinished_runs_of_a_name(tmp_path: Path) -> None:
    """Those with a checkpoint or a published student, and without a record."""
    storage, folder = Storage(tmp_path / "root"), tmp_path / "checkpoints"
    assert unfinished_policy(storage, tmp_path, "r") is None
    for name in ("r-000004", "r-000006", "rr-000007", "r-x-000008", "r-9"):
        (folder / name / "step-00000001").mkdir(parents=True)
    (folder / "r-000009").mkdir()
    assert unfinished_policy(storage, tmp_path, "r") == 6
    (tmp_path / "r-000006.json").write_bytes(b"{}")
    assert unfinished_policy(storage, tmp_path, "r") == 4
    keep_outcome(tmp_path, "r-000005", POLICY, VALUES)
    assert unfinished_policy(storage, tmp_path, "r") == 4
    put_policy(storage, POLICY)
    assert unfinished_policy(storage, tmp_path, "r") == 5


def test_a_half_written_outcome_is_no_checkpoint(tmp_path: Path) -> None:
    root = checkpoints_of(tmp_path, "r-000000")
    root.mkdir(parents=True)
    (root / f".{OUTCOME}.{'0' * 32}.tmp").write_bytes(b"{")
    assert newest_checkpoint(root) is None
    assert list(root.iterdir()) == []


def test_phases_are_let_go_of_too(tmp_path: Path) -> None:
    own, other = (Storage(tmp_path / name) for name in ("own", "other"))
    pin(own, pin_name(tmp_path, "r"), {"0" * 32})
    pin(other, pin_name(tmp_path, "r-phase1"), {"0" * 32})
    config = ReplayConfig(phases=(Phase(), Phase(root=other.root)))
    release_run(own, tmp_path, "r", config)
    assert own.list("pins") == other.list("pins") == []
