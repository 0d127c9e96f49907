"""The study on tiny models: cells of each method, results that stay, and a study that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.part import policy_of
from stillroom.cache.store import Cache
from stillroom.tools.bench_only import chosen
from stillroom.tools.bench_quality import finished, run_study
from stillroom.tools.bench_quality_cell import HELD_OUT, START, prepare, result_path, run_cell
from stillroom.tools.bench_quality_cells import Cell, Study, cells_of
from stillroom.tools.bench_quality_clock import Clock

STUDY = Study(
    updates=4,
    eval_every=2,
    intervals=(2,),
    control_interval=2,
    refresh_rows=8,
    seeds=(0,),
    batch_rows=4,
    max_new_tokens=8,
    held_out_prompts=3,
    learning_rate=3e-3,
    topk=16,
    threads=1,
)
SHARPER = 2.0
"""What the teacher's logits are multiplied by."""
NOISE = 0.15
"""Of the student's weights, by their deviation."""
NEEDS_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Study:
    """A study of a tiny teacher that is surer of itself than random weights are, and of a student
    that has lost some of its weights' digits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("study")
    model: Any = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPER)
        model.save_pretrained(folder / "teacher")
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(NOISE * weight.std() * noise if weight.dim() > 1 else 0)
        model.save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(folder / name)
    for name, count in (("prompts", 24), ("held_out", 4)):
        lines = (json.dumps({"prompt": f"{name} {i}: abc"}) + "\n" for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return replace(STUDY, models=str(folder))


@pytest.fixture(scope="module")
def prepared(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with what all cells share."""
    output = tmp_path_factory.mktemp("output")
    prepare(study, output)
    return output


def point_kl(point: dict[str, Any], source: str = "teacher") -> float:
    """Forward KL of a measurement."""
    return float(point[source]["forward_kl_nats"])


def test_what_cells_share_is_measured_once(study: Study, prepared: Path) -> None:
    rows = json.loads((prepared / HELD_OUT).read_text())["rows"]
    assert len(rows) == 3
    assert all(0 < len(row["completion"]) <= 8 for row in rows)
    start = json.loads((prepared / START).read_text())
    assert start["teacher"]["positions"] == sum(len(row["completion"]) for row in rows)
    assert point_kl(start) > 0.05
    assert 0 < start["student"]["tail_mass"] < 1


def test_a_measurement_is_that_of_the_whole_distributions(study: Study, prepared: Path) -> None:
    """Plain softmaxes of both models give the same, and with K = V there is no tail."""
    from transformers import AutoModelForCausalLM

    from stillroom.tools.bench_quality_held_out import HeldOut, Models

    models = Models.of(study)
    dense = replace(study, topk=models.teacher.vocab_size)
    measured = HeldOut(dense, models, prepared / HELD_OUT).measure()
    kl = list[torch.Tensor]()
    for row in json.loads((prepared / HELD_OUT).read_text())["rows"]:
        ids = torch.tensor([row["prompt"] + row["completion"]])
        logprob = []
        for files in (models.teacher, models.student):
            model: Any = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
            with torch.no_grad():
                logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1]
            logprob.append(logits.double().log_softmax(1))
        t, s = logprob
        kl.append((t.exp() * (t - s)).sum(1))
    assert point_kl(measured) == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert measured["teacher"]["tail_mass"] == 0


@pytest.mark.parametrize(
    "cell",
    [
        Cell("replay", 2, "forward", 0),
        Cell("grouped", 2, "forward", 0),
        Cell("shuffled", 2, "forward", 0),
        Cell("replay", 2, "reverse_truncated", 0),
    ],
    ids=lambda cell: cell.way + cell.objective,
)
def test_a_cell_of_replay(
    study: Study, prepared: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[Path]()
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append(path))
    run_cell(study, cell, prepared)
    curve = json.loads(result_path(prepared, cell).read_text())["curve"]
    assert [point["updates"] for point in curve] == [0, 2, 4]
    assert [p["wall_s"] for p in curve] == sorted(p["wall_s"] for p in curve)
    assert curve[-1]["cpu_s"] > curve[1]["cpu_s"] > 0
    cache = Cache.open(seen[-1] / "cache")
    positions = [(policy_of(p), cache.commit_of(p).positions) for p in cache.parts()]
    for part in cache.parts():
        prompts = Counter(cache.read(part)["prompt_id"].tolist())
        assert set(prompts.values()) == {4 if cell.method == "grouped" else 1}
    assert [version for version, _ in positions] == [0, 1]
    counted = [p["teacher_positions"] for p in curve]
    assert counted == [0, positions[0][1], sum(n for _, n in positions)]
    assert point_kl(curve[-1]) != point_kl(curve[0])
    assert all(
        np.isfinite(list(p[s].values())).all() for p in curve for s in ("student", "teacher")
    )


def test_replay_learns_and_its_control_does_not(study: Study, prepared: Path) -> None:
    longer = replace(study, updates=24, eval_every=24, batch_rows=8, refresh_rows=16)
    last = {}
    for method in ("replay", "shuffled"):
        cell = Cell(method, 12, "forward", 1)
        run_cell(longer, cell, prepared)
        first, end = json.loads(result_path(prepared, cell).read_text())["curve"]
        last[method] = end["teacher"]["reverse_kl_nats"]
    before = first["teacher"]["reverse_kl_nats"]
    assert last["replay"] < 0.9 * before < 1.1 * before < last["shuffled"], (before, last)


def test_a_clock_leaves_pauses_out() -> None:
    clock = Clock()
    with clock.running():
        sum(range(100_000))
        with clock.paused():
            before = clock.wall_s, clock.cpu_s
            time.sleep(0.05)
            assert (clock.wall_s, clock.cpu_s) == before
    assert 0 < before[0] <= clock.wall_s < before[0] + 0.05


def test_other_settings_are_refused(study: Study, prepared: Path) -> None:
    assert finished(study, prepared)
    with pytest.raises(MismatchError, match="learning_rate"):
        finished(replace(study, learning_rate=0.5), prepared)
    with pytest.raises(ConfigError, match="nothing-here"):
        run_study(study, prepared, only=["nothing-here"])


def test_a_finished_cell_is_not_run_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = list[Any]()

    def note(*call: Any) -> bool:
        ran.append(call)
        return True

    monkeypatch.setattr("stillroom.tools.bench_quality._in_a_process", note)
    cells = list(cells_of(study))
    result_path(tmp_path, cells[1]).parent.mkdir()
    result_path(tmp_path, cells[1]).write_text('{"curve":[]}')
    (tmp_path / START).write_text("{}")
    assert run_study(study, tmp_path) == []
    assert [call[2] for call in ran] == [cell for cell in cells if cell != cells[1]]
    ran.clear()
    run_study(study, tmp_path, with_trl=False, only=["*.jsd.*"])
    assert [call[2].name for call in ran] == ["replay-2.jsd.0"]


@pytest.mark.slow
@NEEDS_TRL
def test_trl_learns_from_the_same_prompts_and_a_broken_cell_is_told(
    study: Study, prepared: Path, tmp_path: Path
) -> None:
    longer = replace(study, updates=12, eval_every=12)
    for name in (HELD_OUT, START):
        (tmp_path / name).write_bytes((prepared / name).read_bytes())
    assert run_study(longer, tmp_path, only=["trl.forward.0"]) == []
    ((cell, (first, last)),) = finished(longer, tmp_path).items()
    assert cell == Cell("trl", 0, "forward", 0)
    assert last["teacher_positions"] > 12 * 4
    assert last["cpu_s"] > 0
    assert point_kl(last) < point_kl(first)
    (tmp_path / HELD_OUT).write_text("{}")
    assert run_study(longer, tmp_path, only=["trl.jsd.0"]) == [Cell("trl", 0, "jsd", 0)]


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_study_goes_on_and_its_cells_end_with_it(study: Study, tmp_path: Path) -> None:
    only = ["replay-2.forward.0", "replay-2.jsd.0"]
    first, second = chosen(list(cells_of(study)), only)
    program = (
        "from pathlib import Path; from stillroom.tools.bench_quality import run_study;"
        "from stillroom.tools.bench_quality_cells import Study;"
        f"run_study({study!r}, Path({str(tmp_path)!r}), only={only!r})"
    )
    started = subprocess.Popen([sys.executable, "-c", program])
    try:
        _wait(lambda: result_path(tmp_path, first).exists() and (tmp_path / "work").exists())
        _wait(lambda: (tmp_path / "work" / second.name).exists())
        children = psutil.Process(started.pid).children(recursive=True)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
    _wait(lambda: not any(child.is_running() for child in children))
    written = result_path(tmp_path, first).stat().st_mtime_ns
    assert run_study(study, tmp_path, only=only) == []
    assert result_path(tmp_path, first).stat().st_mtime_ns == written
    assert finished(study, tmp_path).keys() == {first, second}
    assert not list((tmp_path / "work").iterdir())


def _wait(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)
