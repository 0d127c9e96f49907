"""The gradient of a step: one denominator, counted before the first backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.cache.errors import MismatchError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.schema import SOURCES
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.stream import ReplayStream
from stillroom.replay.tensors import step_tensors
from stillroom.train.objective import Objective
from stillroom.train.objectives import cross_entropy, divergence
from stillroom.train.parallel import Parallel
from stillroom.train.replay_loss import ReplayLoss, StepCount
from stillroom.train.step import Tokens, backward, batch_of, count_of
from stillroom.train.student import Student, load_student, to_target

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts, two of each prompt."""
    return make_cache(tmp_path_factory.mktemp("cache"), samples=2)


@pytest.fixture
def student(student_dir: Path) -> Student:
    """In float64."""
    return load_student(inspect_model(str(student_dir)), "float32", CPU).train().double()


def batches(cache: Cache, count: int, **settings: Any) -> list[Batch]:
    """The first of a stream."""
    config = StreamConfig(**{"batch_rows": 6, "max_tokens": 64, "threads": 1} | settings)
    with ReplayStream(Source(cache, cache.snapshot()), config) as stream:
        return [stream.next_batch() for _ in range(count)]


def mixed(batch: Batch) -> Batch:
    """The same, with every third position written by the teacher."""

    def marked(micro: MicroBatch | None) -> MicroBatch | None:
        if micro is None:
            return None
        written = np.arange(micro.num_positions) % 3 == 0
        return replace(micro, source=np.where(written, SOURCES.index("teacher"), micro.source))

    return replace(batch, micro_batches=tuple(map(marked, batch.micro_batches)))


def gradient(student: Student, cache: Cache, taken: list[Batch], **objective: Any) -> Any:
    """What `backward` found, and the gradient from end to end."""
    student.zero_grad()
    loss = ReplayLoss(student, cache.identity, Objective(**objective))
    found = backward(Parallel(student.model), loss, taken)
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return found, torch.cat(grads)


def test_accumulated_batches_have_one_mean(student: Student, cache: Cache) -> None:
    (whole,), halves = batches(cache, 1, batch_rows=12), batches(cache, 2)
    one, expected = gradient(student, cache, [whole])
    other, found = gradient(student, cache, halves)
    assert one.count == other.count == StepCount(cache.snapshot().positions)
    assert other.loss == pytest.approx(one.loss, abs=1e-12)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_each_part_of_the_loss_has_the_number_of_its_own_positions(
    student: Student, cache: Cache, share: float
) -> None:
    """The divergence all of them, cross-entropy those whose text the teacher wrote."""
    taken = [mixed(batch) for batch in batches(cache, 2)]
    found, grad = gradient(student, cache, taken, cross_entropy=share)
    micro = [m for batch in taken for m in batch.micro_batches if m is not None]
    crossed = np.concatenate([m.source == SOURCES.index("teacher") for m in micro])
    assert found.count.positions == len(crossed)
    assert found.count.cross_entropy == (crossed.sum() if share else 0)
    student.zero_grad()
    targets = [to_target(m, CPU).to(dtype=torch.float64) for m in micro]
    vocab = cache.identity.vocab_size
    pairs = [(student(m), t) for m, t in zip(micro, targets, strict=True)]
    kl = torch.cat([divergence(*pair, vocab_size=vocab) for pair in pairs])
    ce = torch.cat([cross_entropy(*pair, vocab_size=vocab) for pair in pairs])
    expected = (1 - share) * kl.mean() + share * ce[torch.from_numpy(crossed)].mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.loss == pytest.approx(expected.item(), abs=1e-9)
    other = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert (grad - other).abs().max() < 1e-9


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_weights_multiply_what_each_position_adds(
    student: Student, cache: Cache, share: float
) -> None:
    """And change nothing in what a step is divided by."""
    (batch,) = (mixed(batch) for batch in batches(cache, 1))
    rng = np.random.default_rng(0)
    micro = [
        replace(m, weight=rng.uniform(0, 2, m.num_positions).astype(np.float32))
        for m in batch.micro_batches
        if m is not None
    ]
    weighted = replace(batch, micro_batches=tuple(micro))
    found, _ = gradient(student, cache, [weighted], cross_entropy=share)
    vocab = cache.identity.vocab_size
    expected = 0.0
    with torch.no_grad():
        for m in micro:
            target, logits = to_target(m, CPU).to(dtype=torch.float64), student(m)
            weight = torch.from_numpy(m.weight).double()
            crossed = torch.from_numpy(m.source == SOURCES.index("teacher"))
            kl = (weight * divergence(logits, target, vocab_size=vocab)).sum()
            ce = (weight * crossed * cross_entropy(logits, target, vocab_size=vocab)).sum()
            expected += (1 - share) * kl.item() / found.count.positions
            expected += share * ce.item() / max(1, found.count.cross_entropy)
    assert found.count.positions == sum(m.num_positions for m in micro)
    assert found.loss == pytest.approx(expected, abs=1e-9)


def test_without_text_to_cross_there_is_only_the_rest(student: Student, cache: Cache) -> None:
    """All rows are the student's: the term is 0, and not 0 / 0."""
    taken = batches(cache, 1)
    plain, expected = gradient(student, cache, taken)
    found, grad = gradient(student, cache, taken, cross_entropy=0.25)
    assert found.count.cross_entropy == 0
    assert found.loss == pytest.approx(0.75 * plain.loss)
    assert torch.allclose(grad, 0.75 * expected)


def test_an_idle_micro_batch_has_a_gradient_of_zeros(student: Student, cache: Cache) -> None:
    """For every parameter, so that the rank meets the others."""
    (batch,) = batches(cache, 1)
    idle = replace(batch, micro_batches=(None,))
    found, grad = gradient(student, cache, [idle], cross_entropy=0.5)
    assert found.loss == 0
    assert found.micro == ()
    assert len(grad) == sum(p.numel() for p in student.parameters())
    assert not grad.any()


def test_a_step_without_scored_tokens_has_no_loss_and_a_gradient_of_zeros(
    student: Student, cache: Cache
) -> None:
    """Idle micro-batches of every rank, or a loop of one's own that counts none."""
    (batch,) = batches(cache, 1)
    idle = replace(batch, num_positions=0, micro_batches=(None, None))
    found, grad = gradient(student, cache, [idle])
    assert found.count == StepCount(0)
    assert found.loss == 0
    assert not grad.any()


def test_outcomes_are_what_the_student_said(student: Student, cache: Cache) -> None:
    """Logprobs at the sampling temperature, losses at the cache's."""
    (batch,) = batches(cache, 1, batch_rows=12, max_tokens=4096)
    (micro,) = batch.micro_batches
    assert micro is not None
    half = np.full(micro.num_positions, 0.5, np.float32)
    half[::4] = np.nan
    micro = replace(micro, sampling_temperature=half)
    found, _ = gradient(student, cache, [replace(batch, micro_batches=(micro,))])
    (outcome,) = found.micro
    logits = student(micro).detach()
    at = torch.arange(len(logits)), torch.from_numpy(micro.sampled_id)
    known = ~np.isnan(half)
    for temperature, chosen in ((0.5, known), (1.0, ~known)):
        logprob = (logits / temperature).log_softmax(-1)[at].numpy()
        np.testing.assert_allclose(outcome.student_logprob[chosen], logprob[chosen], atol=1e-6)
    assert np.isnan(outcome.behaviour_logprob).tolist() == np.isnan(half).tolist()
    assert (outcome.behaviour_logprob[known] == -3).all()
    assert outcome.loss.mean() == pytest.approx(found.loss)
    at_one = logits.log_softmax(-1)[at].numpy()
    np.testing.assert_allclose(outcome.cross_entropy, -at_one, atol=1e-6)
    probability = logits.softmax(-1)
    probability.scatter_(1, torch.from_numpy(micro.topk_id).long(), 0)
    probability[at] = 0
    tail = probability.sum(1).log().numpy()
    np.testing.assert_allclose(outcome.student_tail_logprob, tail, atol=1e-5)
    kept = [y in row for y, row in zip(micro.sampled_id, micro.topk_id, strict=True)]
    assert outcome.in_topk.tolist() == kept
    assert set(kept) == {False, True}


def test_tokens_are_counted_as_stored_as_read_and_as_padded(cache: Cache) -> None:
    apart = batches(cache, 1, batch_rows=12, max_tokens=4096)[0].micro_batches[0]
    groups = {"batch_rows": 12, "max_tokens": 4096, "group_rows": 2, "share_prompts": True}
    shared = batches(cache, 1, **groups)[0].micro_batches[0]
    assert apart is not None
    assert shared is not None
    lengths = np.concatenate([c.row_lengths() for c in cache.snapshot().commits])
    whole = int(lengths[:, 0].sum())
    most = int(lengths[:, 0].max())
    assert Tokens.of([apart]) == Tokens(whole, whole, 12 * most)
    assert Tokens.of([shared]) == Tokens(whole, whole - int(lengths[::2, 1].sum()), 12 * most)
    assert Tokens.of([]) == Tokens()


def test_a_step_of_a_dataset_is_a_batch(student: Student, cache: Cache) -> None:
    (batch,) = batches(cache, 1)
    again = batch_of(step_tensors(batch))
    assert (again.rows, again.caches) == (batch.rows, batch.caches)
    one, expected = gradient(student, cache, [batch])
    other, found = gradient(student, cache, [again])
    assert other.loss == one.loss
    assert torch.equal(found, expected)


def held(cache: Cache, kind: str) -> Any:
    """The cache's identity, if it held extra ids."""
    return replace(cache.identity, extra=0 if kind == "none" else 3, extra_kind=kind)


@pytest.mark.parametrize(
    ("kind", "takes"),
    [
        ("forward", {"student"}),
        ("reverse", {"student"}),
        ("reverse_kl_rb", set()),
        ("policy_gradient", set()),
        ("multi_sample_policy_gradient", {"student"}),
        ("forward_kl_tail_samples", {"tail"}),
    ],
)
def test_extra_ids_that_a_kind_takes(
    student: Student, cache: Cache, kind: str, takes: set[str]
) -> None:
    needs = kind in ("multi_sample_policy_gradient", "forward_kl_tail_samples")
    for extra in ("none", "student", "tail"):
        if needs and extra not in takes:
            with pytest.raises(MismatchError, match=f"which {kind} is made of"):
                ReplayLoss(student, held(cache, extra), Objective(kind=kind))
        else:
            loss = ReplayLoss(student, held(cache, extra), Objective(kind=kind))
            assert loss.takes_extras == (extra in takes)


def with_extra(cache: Cache, behaviour: float = np.nan) -> MicroBatch:
    """One extra id at each position, which is not among the others."""
    (batch,) = batches(cache, 1, max_tokens=4096)
    (micro,) = batch.micro_batches
    assert micro is not None
    size, logprob = micro.num_positions, micro.tail_logprob - np.float32(2)
    spare = [np.setdiff1d(np.arange(200), [*row, y])[0] for row, y in rows_of(micro)]
    return replace(
        micro,
        extra_id=np.array(spare, np.int32)[:, None],
        extra_logprob=logprob.astype(np.float16)[:, None],
        extra_behaviour_logprob=np.full((size, 1), behaviour, np.float32),
    )


@pytest.mark.parametrize("importance", ["none", "full"])
def test_the_likeliest_tokens_are_no_draws(student: Student, cache: Cache, importance: str) -> None:
    """Their mean would be of no expectation; a divergence takes them as buckets."""
    micro = with_extra(cache, behaviour=-3.0)
    noted = replace(micro, extra_likeliest=micro.row == micro.row[-1])
    objective = Objective(kind="multi_sample_policy_gradient", importance=importance)
    loss, count = ReplayLoss(student, held(cache, "student"), objective), StepCount(1)
    assert loss(micro, count).value.isfinite().all()
    with pytest.raises(MismatchError, match=rf"row {micro.row[-1]}, extra_id.*likeliest"):
        loss(noted, count)
    ReplayLoss(student, held(cache, "student"), Objective())(noted, count)


def test_extra_ids_are_buckets_of_a_divergence(student: Student, cache: Cache) -> None:
    """A finer partition can only raise it."""
    micro = with_extra(cache)
    count = StepCount(micro.num_positions)
    with torch.no_grad():
        values = [
            ReplayLoss(student, held(cache, extra), Objective())(micro, count).value
            for extra in ("none", "student", "tail")
        ]
    assert torch.equal(values[0], values[2])
    assert (values[1] > values[0] - 1e-9).all()
    assert (values[1] > values[0] + 1e-3).any()


def rows_of(micro: MicroBatch) -> Any:
    """Kept ids and sampled id of each position."""
    return zip(micro.topk_id, micro.sampled_id, strict=True)


def test_bfloat16_products_give_nearly_the_same(student_dir: Path, cache: Cache) -> None:
    student = load_student(inspect_model(str(student_dir)), "float32", CPU).train()
    taken, found = batches(cache, 1), []
    for bf16 in (False, True):
        student.zero_grad()
        loss = ReplayLoss(student, cache.identity, Objective(), bf16=bf16)
        step = backward(Parallel(student.model), loss, taken)
        grads = [p.grad for p in student.parameters() if p.grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}
        found.append((step.loss, torch.cat([grad.flatten() for grad in grads])))
    (exact, grad), (rounded, other) = found
    assert 0 < abs(exact - rounded) < 0.02 * exact
    assert 0 < float((grad - other).norm()) < 0.1 * float(grad.norm())


def test_counting_asks_nobody_without_cross_entropy(student: Student, cache: Cache) -> None:
    taken = [mixed(batch) for batch in batches(cache, 1)]
    parallel = Parallel(student.model)
    loss = ReplayLoss(student, cache.identity, Objective())
    parallel.world = 2  # a collective would fail: there is no group
    assert count_of(parallel, loss, taken) == StepCount(taken[0].num_positions)
