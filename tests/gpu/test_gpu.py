"""On CUDA: scores, sampled logprobs, training and resume are what they are on the CPU.

Tolerances are for tiny random models: float32 sums in another order, and bfloat16 with 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.summarise import summarise
from stillroom.cache.tail_draws import uniforms
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay.config import StreamConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.transformers_sampler import TransformersSampler
from stillroom.train.config import ReplayConfig
from stillroom.train.trainer import ReplayTrainer
from tests.conftest import VOCAB

DEVICE = "cuda"
TOPK = 8
# Largest and mean difference from float32 on the CPU, nats. Storage in float16 makes up to 0.008.
TOLERANCE_NATS = {"float32": (0.01, 0.002), "bfloat16": (0.4, 0.1)}
SAMPLED_TOLERANCE_NATS = {"float32": (1e-4, 2e-5), "bfloat16": (0.4, 0.1)}
CONFIG = ReplayConfig(
    learning_rate=1e-2,
    num_train_epochs=4,
    drift_every_steps=2,
    lr_scheduler_type="cosine",
    replay=StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4),
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that sum in one order, where torch has them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve rollouts, scored on the CPU."""
    return make_cache(tmp_path_factory.mktemp("cache"))


def random_ids(*lengths: int) -> list[np.ndarray]:
    """Token ids, all different."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 250, length).astype(np.uint32) for length in lengths]


def scores(folder: Path, device: str, dtype: str) -> list[RowScores]:
    """A teacher's scores of three rows, in order."""
    rows = [ScoreRow(ids, np.arange(1, len(ids))) for ids in random_ids(40, 17, 3)]
    config = TeacherConfig(model=str(folder), device=device, dtype=dtype)
    teacher = TransformersTeacher(inspect_model(str(folder)), config)
    found = dict(teacher.score(rows, ScoreSpec(topk=TOPK)))
    return [found[i] for i in range(len(rows))]


def assert_near(found: np.ndarray, wanted: np.ndarray, largest: float, mean: float) -> None:
    """Differences are below both bounds."""
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    assert difference.max() <= largest
    assert difference.mean() <= mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_those_of_the_cpu(teacher_dir: Path, dtype: str) -> None:
    """The k-th likeliest entries are compared, as entries that nearly tie may change places."""
    here, there = scores(teacher_dir, "cpu", "float32"), scores(teacher_dir, DEVICE, dtype)
    for want, got in zip(here, there, strict=True):
        assert_near(got.sampled_logprob, want.sampled_logprob, *SAMPLED_TOLERANCE_NATS[dtype])
        assert_near(got.topk_logprob, want.topk_logprob, *TOLERANCE_NATS[dtype])
        assert_near(got.tail_logprob, want.tail_logprob, *TOLERANCE_NATS[dtype])
    if dtype == "float32":
        ids = (np.concatenate([row.topk_id for row in rows]) for rows in (here, there))
        assert np.equal(*ids).mean() > 0.9


def test_a_cut_and_draws_are_those_of_the_cpu() -> None:
    """Of equal logits; a sum that lies at the mass, or a number at an edge, may fall either way."""
    rng = np.random.default_rng(0)
    logit_PV = torch.from_numpy(rng.normal(0, 3, (500, 1000)).astype(np.float32))
    spec = ScoreSpec(topk=100, mass=0.9, extra=4, extra_kind="tail")
    uniform_PM = torch.from_numpy(uniforms(1, 500, 4))
    sampled_P = torch.zeros(500, dtype=torch.int64)
    here, there = (
        summarise(
            logit_PV.clone().to(device),
            sampled_P.to(device),
            spec,
            np.zeros(500),
            uniform_PM=uniform_PM.to(device),
        )
        for device in ("cpu", DEVICE)
    )
    assert len(set(here["topk_count"].tolist())) > 20
    for name in ("topk_id", "topk_count", "extra_id"):
        same = here[name] == there[name].cpu()
        assert same.float().mean() > 0.98, name
    assert_near(there["tail_logprob"].cpu().numpy(), here["tail_logprob"].numpy(), 0.05, 1e-3)


def test_sampled_logprobs_equal_a_dense_recomputation(student_dir: Path) -> None:
    """Within 2e-4 nats of one unpadded forward on the CPU."""
    prompts = random_ids(9, 1, 14, 5)
    config = SamplerConfig(max_new_tokens=12, batch_rows=3, temperature=0.7, device=DEVICE)
    sampler = TransformersSampler(inspect_model(str(student_dir)), config)
    found = dict(sampler.sample(prompts, 0))
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        drawn = found[i].completion.astype(np.int64)
        ids = torch.from_numpy(np.concatenate([prompt.astype(np.int64), drawn]))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1, :VOCAB].double() / 0.7
        dense = torch.log_softmax(logits, dim=-1)[torch.arange(len(drawn)), drawn]
        np.testing.assert_allclose(found[i].behaviour_logprob, dense, rtol=0, atol=2e-4)


def trainer(cache: Cache, student_dir: Path, output: Path, config: ReplayConfig) -> ReplayTrainer:
    """A trainer of the tiny student; its device must be the one that is tested."""
    snapshot = cache.snapshot()
    made = ReplayTrainer(student_dir, cache, config, snapshot=snapshot, output=output, run="gpu")
    assert {parameter.device.type for parameter in made.student.parameters()} == {DEVICE}
    return made


def test_bfloat16_training_lowers_the_loss(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, num_train_epochs=8, bf16=True)
    made = trainer(cache, student_dir, tmp_path, config)
    report = made.train()
    assert report.steps == 16
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert {parameter.dtype for parameter in made.student.parameters()} == {torch.float32}


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_resume_is_exact(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """Continued from the checkpoint of step 6 of 8, losses and weights are those of the run."""
    config = replace(CONFIG, save_steps=3)
    whole = trainer(cache, student_dir, tmp_path, config)
    report = whole.train()
    resumed = trainer(cache, student_dir, tmp_path, config)
    continued = resumed.train()
    assert report.steps == continued.steps == 8
    assert continued.losses == report.losses[6:]
    assert continued.positions == report.positions
    for mine, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
