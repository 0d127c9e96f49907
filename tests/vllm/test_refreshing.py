"""A run that refreshes itself with vLLM as its sampler: rows come from the weights that the student
has at that moment."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.cache.vllm_engine import VllmEngine
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import register_initial
from stillroom.replay.prompts import PromptsConfig, load_prompts
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.vllm_sampler import VllmSampler
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.refreshing import RefreshCallback, Refresher
from stillroom.train.trainer import ReplayTrainer
from tests.vllm.conftest import sampler_config

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
EVERY = 2
CONFIG = ReplayConfig(
    device="cpu",
    learning_rate=1e-2,
    max_steps=5,
    replay=StreamConfig(
        batch_rows=2, max_tokens=256, block_rows=2, window_rows=4, follow_every_steps=EVERY
    ),
)


class Recorder(Callback):
    """Keeps how far the student is from what sampled each step's rows, nats at most."""

    def __init__(self) -> None:
        self.gaps = list[float]()

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        gap = [np.abs(m.student_logprob - m.behaviour_logprob) for m in outcome.micro]
        self.gaps.append(float(np.concatenate(gap).max()))


@pytest.fixture
def shared_engine(
    sampler_engine: VllmEngine, padded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[VllmEngine]:
    """The session's engine for the run's sampler; it gets its own weights back."""

    def load(files: ModelFiles, config: SamplerConfig) -> VllmSampler:
        return VllmSampler(files, config, sampler_engine)

    monkeypatch.setattr("stillroom.train.refreshing.load_sampler", load)
    yield sampler_engine
    sampler_engine.load_weights(padded_model)


def test_rows_are_those_of_the_student_of_that_moment(
    tmp_path: Path,
    teacher_model: Path,
    padded_model: Path,
    prompts_file: Path,
    shared_engine: VllmEngine,
) -> None:
    config = TeacherConfig(model=str(teacher_model), device="cpu")
    files, student = inspect_model(str(teacher_model)), inspect_model(str(padded_model))
    cache = Cache.create(tmp_path / "root", identity_of(files, config, ScoreSpec(topk=16)))
    register_initial(cache.storage, student, "test")
    tokenizer = AutoTokenizer.from_pretrained(padded_model)
    prompts = load_prompts(PromptsConfig(source=str(prompts_file)), tokenizer, 64).prompts
    sampler = sampler_config(max_new_tokens=6)
    refresh = RefreshConfig(prompts_per_cycle=4, unit_rollouts=4, max_lag=0)
    teacher = TransformersTeacher(files, config)
    refresher = Refresher(cache, teacher, prompts, sampler, refresh)
    recorder = Recorder()
    callbacks = (recorder, RefreshCallback(refresher))
    output = tmp_path / "out"
    trainer = ReplayTrainer(str(padded_model), cache, CONFIG, output=output, callbacks=callbacks)
    trainer.train()
    gaps = recorder.gaps
    assert len(gaps) == CONFIG.max_steps
    assert max(gaps[0], gaps[EVERY], gaps[2 * EVERY]) < 1e-3 < min(gaps[1], gaps[EVERY + 1])
    assert not list(output.glob(".sampled-*"))
