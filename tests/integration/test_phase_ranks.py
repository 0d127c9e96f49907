"""Several ranks (gloo) in phases of fine-tuning and replay end with the weights of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.cache.store import Cache
from tests.integration.test_ranks import Ranks


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_in_phases_equal_one(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    """To the last digits of float64. An epoch of the text ends with one row, so that ranks are idle
    in it."""
    root, other, text = (tmp_path / name for name in ("root", "other", "text.jsonl"))
    make_cache(root, rows=11)
    make_cache(other, rows=8, seed=7)
    text.write_text("".join(json.dumps({"text": "abc " * n}) + "\n" for n in range(1, 8)))
    supervised = {"source": str(text), "batch_rows": 3, "max_length": 64, "max_tokens": 64}
    phases = [
        {"supervised": supervised, "max_steps": 3, "learning_rate": 3e-3},
        {"max_steps": 2, "objective": {"kind": "jsd", "beta": 0.3}},
        {"root": str(other), "max_steps": 1},
    ]
    ranks = Ranks(tmp_path, str(root), {"student": student_dir})
    settings = {"num_train_epochs": 1, "phases": phases, "phase_cycles": 2, "double": True}
    ranks.case((1,), "one", "student", **settings)
    for kind in ("ddp", "fsdp"):
        ranks.case((2,), kind, "student", **settings, parallel=kind)
    ranks.run(timeout=400)
    assert len(ranks.found(1, "one")["losses"]) == 12
    for kind in ("ddp", "fsdp"):
        ranks.assert_same((1, "one"), (2, kind), 1e-12)
