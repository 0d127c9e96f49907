"""What `stillroom bench score` measures of vLLM: one engine three ways, and the exact teacher."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.teacher import ScoreRow
from stillroom.tools.bench_score_programs import vllm_exact, vllm_plain
from stillroom.tools.bench_score_rows import Scored
from tests.tools.test_bench_score import Turns
from tests.vllm.conftest import teacher_config

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_programs_take_their_turns(teacher_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows = [ScoreRow(np.arange(1, 30, dtype=np.uint32), np.arange(9, 29)) for _ in range(3)]
    scored = Scored(rows, teacher_config(teacher_model), 8, torch.get_num_threads())
    turns = Turns(2)
    vllm_plain(turns, scored)  # type: ignore[arg-type]
    assert sorted(turns.notes) == ["prefill_s", "teacher_s", "thrown_away_s"]
    assert min(turns.notes.values()) > 0
    turns = Turns(1)
    vllm_exact(turns, scored)  # type: ignore[arg-type]
    assert turns.steps < 0
