"""`stillroom bench score`: the bare forward finds what the teacher finds, and what is measured is
what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError, MissingError
from stillroom.cache.teacher import ScoreSpec, TeacherConfig
from stillroom.tools import bench_score_memory
from stillroom.tools.bench_score import BARE, OURS, THROWN, VLLM, _shares
from stillroom.tools.bench_score_front import measure_front_end
from stillroom.tools.bench_score_memory import measure_memory
from stillroom.tools.bench_score_rows import Scored, text_rows
from stillroom.tools.bench_train_rows import Sizes

SIZES = Sizes(rows=4, prompt=12, completion=6, topk=8)


@pytest.fixture
def models(tmp_path: Path, teacher_dir: Path) -> Path:
    """A folder like the quickstart's, with tiny models."""
    shutil.copytree(teacher_dir, tmp_path / "teacher")
    for name in ("prompts.jsonl", "held_out.jsonl"):
        chats = [{"messages": [{"role": "user", "content": f"{name} {i}: abc"}]} for i in range(9)]
        (tmp_path / name).write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return tmp_path


class Turns:
    """Lets a program take some steps, and keeps what it notes."""

    def __init__(self, steps: int) -> None:
        """So many steps."""
        self.steps = steps
        self.notes: dict[str, float] = {}

    def next(self) -> bool:
        """Whether there is one more."""
        self.steps -= 1
        return self.steps >= 0

    def note(self, name: str, value: float) -> None:
        """Add it."""
        self.notes[name] = self.notes.get(name, 0.0) + value


def test_rows_are_of_one_length(models: Path) -> None:
    rows = text_rows(models, SIZES)
    assert [len(row.token) for row in rows] == [18] * 4
    assert all(row.targets.tolist() == list(range(12, 18)) for row in rows)
    with pytest.raises(InputError, match="1000 rows of 18 tokens"):
        text_rows(models, Sizes(rows=1000, prompt=12, completion=6))
    (models / "held_out.jsonl").unlink()
    with pytest.raises(MissingError, match="held_out"):
        text_rows(models, SIZES)


def test_the_bare_forward_finds_the_same_entries(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from stillroom.cache.fingerprint import inspect_model
    from stillroom.cache.transformers_teacher import TransformersTeacher
    from stillroom.tools import bench_score_programs as programs

    config = TeacherConfig(model=str(models / "teacher"), device="cpu", head_rows=5)
    scored = Scored(text_rows(models, SIZES), config, 8, torch.get_num_threads())
    kept: list[list[Any]] = []
    bare = programs._bare_batch
    monkeypatch.setattr(programs, "_bare_batch", lambda *args: kept.append(bare(*args)))
    programs.bare_forward(Turns(1), scored)  # type: ignore[arg-type]
    (found,) = kept
    ids = np.concatenate([part.numpy() for part in found[1::2]])
    teacher = TransformersTeacher(inspect_model(config.model), config)
    scores = dict(teacher.score(scored.rows, ScoreSpec(topk=8)))
    expected = np.concatenate([scores[i].topk_id for i in range(4)])
    assert ids.shape == expected.shape == (24, 8)
    np.testing.assert_array_equal(np.sort(ids, 1), np.sort(expected.astype(np.int64), 1))
    turns = Turns(2)
    programs.transformers_teacher(turns, scored)  # type: ignore[arg-type]
    assert turns.notes["model_s"] > 0


def test_the_front_end_is_measured() -> None:
    found = measure_front_end(rows=1)
    assert (found.topk, found.positions) == (128, 511)
    assert 0 < found.least_us <= found.microseconds <= found.most_us


def test_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_score_memory, "PARTS", 4)
    found = measure_memory(2000, 4)
    assert (found.positions, found.parts) == (2000, 4)
    assert found.later_mb > 0


def test_shares_are_medians_over_rounds() -> None:
    def notes(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": value} for value in seconds]

    taken = {BARE: notes(9, 1, 4), OURS: notes(10, 2, 5), VLLM: notes(1, 1, 1)}
    ours, vllm = _shares(taken)
    assert (ours.name, ours.beside, ours.share) == (OURS, BARE, 0.8)
    assert (vllm.name, vllm.beside, vllm.share) == (VLLM, OURS, 5)
    assert THROWN not in (ours.beside, vllm.beside)


def test_what_cannot_be_measured_is_refused(run: Any, tmp_path: Path) -> None:
    assert "part" in run("bench", "score", "--part", "ranks").err
    assert "root" in run("bench", "score", tmp_path).err
    assert run("bench", "train", "--part", "engines").status == 2


@pytest.mark.slow
def test_one_run(models: Path, run: Any) -> None:
    flags = ["--models", models, "--step-tokens", 12, 6, "--steps", 2, "--positions", 4000]
    ran = run("bench", "score", *flags, "--threads", 1, "--topk", 8, "--no-peers", "--json")
    assert ran.status == 0, ran.err
    value = ran.json()
    assert [row["name"] for row in value["speeds"]] == [BARE, OURS]
    assert [share["goal"] for share in value["shares"]] == [0.92]
    assert 0 < value["model_share"] < 1
    assert value["front_end"]["positions"] > 0
    assert value["memory"]["parts"] == 40
    text = run("bench", "score", *flags, "--part", "memory", "--topk", 8).out
    assert "MiB in the first tenth" in text
