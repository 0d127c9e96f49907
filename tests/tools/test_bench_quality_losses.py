"""The controls' losses: the scores of other positions, and a reverse KL without a tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.cache.store import Cache
from stillroom.replay.batch import MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.tools.bench_quality_losses import ShuffledLoss, TruncatedReverseLoss, shuffled
from stillroom.train.config import ReplayConfig
from stillroom.train.replay_loss import StepCount
from stillroom.train.student import to_target
from stillroom.train.target import teacher_buckets
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=6, max_tokens=256, block_rows=2, window_rows=4)
CONFIG = ReplayConfig(kind="reverse", device="cpu", max_steps=2, replay=REPLAY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts."""
    return make_cache(tmp_path_factory.mktemp("cache"), topk=16)


@pytest.fixture
def trainer(cache: Cache, student_dir: Path, tmp_path: Path) -> ReplayTrainer:
    return ReplayTrainer(str(student_dir), cache, CONFIG, policy_version=0, output=tmp_path)


def first(trainer: ReplayTrainer) -> MicroBatch:
    """The first micro-batch of its stream."""
    micro = trainer.stream.next_batch().micro_batches[0]
    assert micro is not None
    return micro


def test_shuffled_scores_are_those_of_other_positions(trainer: ReplayTrainer) -> None:
    micro = first(trainer)
    moved = shuffled(micro)
    at = [int(np.flatnonzero((micro.topk_logprob == row).all(1))[0]) for row in moved.topk_logprob]
    assert sorted(at) == list(range(micro.num_positions))
    assert np.mean(np.array(at) == np.arange(len(at))) < 0.2
    assert (moved.topk_id == micro.topk_id[at]).all()
    assert (moved.tail_logprob == micro.tail_logprob[at]).all()
    assert (moved.sampled_id == micro.sampled_id).all()
    found = (moved.topk_id == micro.sampled_id[:, None]) & (moved.topk_logprob > -np.inf)
    assert (moved.sampled_logprob[found.any(1)] == moved.topk_logprob[found]).all()


def test_a_shuffled_loss_is_the_loss_of_shuffled_scores(trainer: ReplayTrainer) -> None:
    micro, count = first(trainer), StepCount(10)
    given = trainer.loss
    other = ShuffledLoss(given.student, given.identity, given.objective)
    found = trainer.parallel.run(other, micro, count)
    assert torch.equal(found.value, trainer.parallel.run(given, shuffled(micro), count).value)
    assert not torch.equal(found.value, trainer.parallel.run(given, micro, count).value)
    assert trainer.parallel.run(other, None, count).total == 0


def test_the_truncated_loss_is_its_sum_over_scored_tokens(trainer: ReplayTrainer) -> None:
    micro, given = first(trainer), trainer.loss
    truncated = TruncatedReverseLoss(given.student, given.identity, given.objective)
    found = trainer.parallel.run(truncated, micro, StepCount(10), 2.0)
    with torch.no_grad():
        logits = trainer.parallel.run(given.student.forward, micro)
    log_s = logits[:, : given.identity.vocab_size].double().log_softmax(1).numpy()
    for i in range(micro.num_positions):
        log_t = dict(zip(micro.topk_id[i].tolist(), micro.topk_logprob[i].tolist(), strict=True))
        log_t.setdefault(int(micro.sampled_id[i]), float(micro.sampled_logprob[i]))
        wanted = sum(math.exp(log_s[i, v]) * (log_s[i, v] - t) for v, t in log_t.items())
        assert found.value[i].item() == pytest.approx(wanted, abs=2e-3)
        rest = 1 - sum(math.exp(log_s[i, v]) for v in log_t)
        assert found.tail_logprob[i].exp().item() == pytest.approx(rest, abs=1e-5)
    assert found.total.item() == pytest.approx(float(found.value.sum()) / 10 * 2, rel=1e-5)
    assert trainer.parallel.run(truncated, None, StepCount(10)).total == 0


class FreeLogits(torch.nn.Module):
    """A student that can say anything at any position."""

    def __init__(self, positions: int, vocab_size: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(positions, vocab_size))

    def forward(self, _: MicroBatch) -> torch.Tensor:
        return self.logits


def test_the_truncated_loss_is_least_off_the_scored_tokens(trainer: ReplayTrainer) -> None:
    """There the student has 1 / e of the teacher's mass on them: it is paid to leave them."""
    micro, given = first(trainer), trainer.loss
    student: Any = FreeLogits(micro.num_positions, given.identity.vocab_size)
    loss = TruncatedReverseLoss(student, given.identity, given.objective)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(300):
        found = loss(micro, StepCount(1))
        found.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    buckets = teacher_buckets(to_target(micro, torch.device("cpu")), given.identity.vocab_size)
    teacher = 1 - buckets.logprob[:, -1].exp().float()
    assert torch.allclose(1 - found.tail_logprob.exp(), teacher / math.e, atol=2e-3)
    assert torch.allclose(found.value, -teacher / math.e, atol=2e-3)
