"""A run in phases: fine-tuning is plain cross-entropy, each step has the settings of its phase, and
where a run stopped in any of them, it goes on to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.cache.errors import ConfigError, InputError, MismatchError, MissingError
from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train import fits
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.objective import Objective
from stillroom.train.phases import Phase
from stillroom.train.run_snapshot import pin_name
from stillroom.train.supervised_data import SupervisedConfig, load_supervised
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4)
CONFIG = ReplayConfig(device="cpu", learning_rate=1e-2, optimizer="SGD", replay=REPLAY)
TEXTS = ["abc abc abc.", "x" * 50, "the cab", "a b c d e f g", "abcabcabcabc", "count: 1 2 3"]


class Stopped(Exception):
    """Ends a run in the middle."""


class Recorder(Callback):
    """Keeps what each step was; raises after one, if that is asked for."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.outcomes: list[StepOutcome] = []
        self._stops_at = stops_at

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Before the step's checkpoint is saved."""
        if outcome.step == self._stops_at:
            raise Stopped
        self.outcomes.append(outcome)

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [outcome.loss for outcome in self.outcomes]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> list[str]:
    """Two caches of twelve rows, of one teacher."""
    folders = [tmp_path_factory.mktemp(name) for name in ("own", "other")]
    return [str(make_cache(f / "cache", seed=i).storage.root) for i, f in enumerate(folders)]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SupervisedConfig:
    """Six documents, one of which is cut."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return SupervisedConfig(source=str(path), max_length=32, max_tokens=64, batch_rows=4)


@pytest.fixture
def run(
    caches: list[str], student_dir: Path, tmp_path: Path
) -> Callable[..., tuple[ReplayTrainer, Recorder]]:
    """Trains the tiny student in phases."""

    def trained(
        phases: Sequence[Phase], name: str = "r", stops_at: int | None = None, **given: Any
    ) -> tuple[ReplayTrainer, Recorder]:
        recorder = Recorder(stops_at)
        config = replace(CONFIG, phases=tuple(phases), **given)
        places: dict[str, Any] = {"output": tmp_path / "out", "run": name}
        made = ReplayTrainer(
            student_dir, caches[0], config, policy_version=0, callbacks=[recorder], **places
        )
        made.train()
        return made, recorder

    return trained


def weights(made: ReplayTrainer) -> list[torch.Tensor]:
    """Of the student."""
    return [p.detach() for p in made.student.model.parameters()]


def same(one: ReplayTrainer, other: ReplayTrainer) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


Run = Callable[..., tuple[ReplayTrainer, Recorder]]


def test_fine_tuning_is_what_transformers_does(
    run: Run, student_dir: Path, text: SupervisedConfig
) -> None:
    """Loss, gradient and weights of plain steps on the same rows, one by one."""
    made, recorder = run([Phase(supervised=text, max_steps=3)], max_grad_norm=1e9)
    rows = load_supervised(text, AutoTokenizer.from_pretrained(student_dir))
    model: Any = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for outcome in recorder.outcomes:
        numbers = sorted({int(n) for one in outcome.micro for n in one.micro.row})
        assert len(numbers) == outcome.rows
        total, positions = torch.zeros(()), 0
        for number in numbers:
            token = torch.from_numpy(rows.token[rows.start[number] : rows.start[number + 1]])
            label = token.long()
            logits = model(label[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, label[1:], reduction="sum")
            positions += len(label) - 1
        loss = total / positions
        assert outcome.num_positions == positions
        assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for mine, theirs in zip(weights(made), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_each_step_has_the_settings_of_its_phase(run: Run, text: SupervisedConfig) -> None:
    phases = [
        Phase(supervised=text, max_steps=2, learning_rate=3e-2),
        Phase(max_steps=1),
        Phase(max_steps=2, objective=Objective(kind="reverse"), learning_rate=5e-3),
    ]
    made, recorder = run(phases, phase_cycles=2)
    found = recorder.outcomes
    assert [one.phase for one in found] == [0, 0, 1, 2, 2] * 2
    assert [one.replayed for one in found] == [False, False, True, True, True] * 2
    rates = [3e-2, 3e-2, 1e-2, 5e-3, 5e-3] * 2
    assert [one.learning_rate for one in found] == pytest.approx(rates)
    epochs = [int(n) for one in found if one.replayed for m in one.micro for n in {*m.micro.row}]
    assert sorted(set(epochs)) == list(range(12)), "two replay phases share one stream"
    for one in found:
        values = [m.loss if one.replayed else m.cross_entropy for m in one.micro]
        assert one.loss == pytest.approx(np.concatenate(values).mean(), rel=1e-4)
    assert all(group["lr"] == 1e-2 for group in made.optimizer.param_groups)


def test_only_replay_is_counted_and_measured(run: Run, text: SupervisedConfig, caches: Any) -> None:
    phases = [
        Phase(supervised=text, max_steps=2),
        Phase(max_steps=2),
        Phase(root=caches[1], max_steps=1),
    ]
    made, recorder = run(phases)
    assert recorder.outcomes[-1].rows == 6
    name = pin_name(made.output, "r")
    paths = [entry.path for entry in made.cache.storage.list("drift") if name in entry.path]
    (record,) = [path for path in paths if path.endswith(f"/{made.step:08d}.json")]
    drift = json.loads(made.cache.storage.get(record))["by_policy"]
    replayed = sum(one.num_positions for one in recorder.outcomes if one.replayed)
    assert {version: sums["positions"] for version, sums in drift.items()} == {"0": replayed}


def test_one_phase_is_what_a_run_without_phases_does(run: Run) -> None:
    plain, without = run([], "plain", num_train_epochs=2.5, gradient_accumulation_steps=2)
    phases = [Phase(num_train_epochs=2.5)]
    made, recorder = run(phases, "phased", gradient_accumulation_steps=2)
    assert recorder.losses == without.losses
    assert [one.rows for one in recorder.outcomes] == [12, 12, 6]
    assert same(made, plain)


def test_a_run_that_stopped_goes_on_to_the_bit(
    run: Run, text: SupervisedConfig, caches: list[str], make_cache: Callable[..., Cache]
) -> None:
    """In every phase, though another cache has grown meanwhile."""
    phases = [
        Phase(supervised=text, max_steps=2),
        Phase(max_steps=2),
        Phase(root=caches[1], max_steps=2, objective=Objective(kind="reverse")),
    ]
    settings = {"phase_cycles": 2, "save_steps": 1, "optimizer": "AdamW", "learning_rate": 1e-3}
    whole, expected = run(phases, "whole", **settings)
    other = Cache.open(caches[1])
    for stops_at in (2, 4, 12):
        name = f"cut{stops_at}"
        with pytest.raises(Stopped):
            run(phases, name, stops_at, **settings)
        assert [p for p in active_pins(other.storage) if p.startswith(f"{name}-phase2-")]
        if stops_at == 12:
            make_cache(Path(caches[1]), seed=77)
        made, recorder = run(phases, name, **settings)
        assert recorder.losses == expected.losses[-len(recorder.losses) :]
        assert 1 <= len(recorder.losses) <= 14 - stops_at
        assert same(made, whole)
        assert not active_pins(other.storage), "let go of"


def test_refusals(run: Run, text: SupervisedConfig, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"absent\.jsonl"):
        run([Phase(supervised=replace(text, source="absent.jsonl"))])
    long = replace(text, max_length=400, max_tokens=400, source=str(tmp_path / "long.jsonl"))
    Path(long.source).write_text(json.dumps({"text": "x" * 300}) + "\n")
    with pytest.raises(InputError, match=r"rows of at most 256 tokens, which.*got 301"):
        run([Phase(supervised=replace(long, batch_rows=1))])
    with pytest.raises(MissingError, match="nowhere"):
        run([Phase(root=str(tmp_path / "nowhere"))])
    with pytest.raises(MismatchError, match="extra ids of kind 'tail'"):
        run([Phase(objective=Objective(kind="forward_kl_tail_samples"))])
    with pytest.raises(ConfigError, match=r"train\.max_steps.*beside train\.phases"):
        replace(CONFIG, phases=(Phase(),), max_steps=3)
    with pytest.raises(ConfigError, match=r"train\.phase_cycles.*1 without phases"):
        replace(CONFIG, phase_cycles=2)


def test_a_phase_on_the_own_root_is_one_on_the_own_cache(run: Run, caches: list[str]) -> None:
    """However that is written; its rows are counted and share the run's stream."""
    written = f"file://{caches[0]}/../{Path(caches[0]).name}/"
    made, recorder = run([Phase(max_steps=1), Phase(root=written, max_steps=1)])
    assert [one.replayed for one in recorder.outcomes] == [True, True]
    rows = [{int(n) for m in one.micro for n in m.micro.row} for one in recorder.outcomes]
    assert sorted(rows[0] | rows[1]) == list(range(12))
    assert made.phases.data(1) is made.phases.own


def test_no_phase_trains_on_what_is_measured(run: Run, caches: list[str]) -> None:
    for root in (caches[1], f"{caches[1]}/"):
        with pytest.raises(ConfigError, match=r"phase\.root: expected another cache than"):
            run([Phase(root=root, max_steps=1)], eval_root=caches[1])


def test_ranks_must_have_the_same_rows(
    run: Run, text: SupervisedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {str: "another"}
    monkeypatch.setattr(fits, "from_every_rank", lambda mine: [mine, other.get(type(mine), mine)])
    with pytest.raises(MismatchError, match=r"text\.jsonl, rank 1: .* got another\."):
        run([Phase(supervised=text, max_steps=1)])
