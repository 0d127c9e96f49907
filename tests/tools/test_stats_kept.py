"""Figures of kept entries, and the bound on what a tail hides, against full distributions."""

import numpy as np
import pytest

from stillroom.tools.stats_kept import Kept, hidden_from_uniform
from tests.cache.fakes import dense_scores, log_softmax

V = 60


def teacher(mass: float, topk: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Full log probabilities of random positions, and their counts, entries and tails."""
    rng = np.random.default_rng(0)
    logit_PV = rng.normal(0, 1, (80, V)) * rng.uniform(0.01, 6, (80, 1))
    scores = dense_scores(logit_PV, np.zeros(80, np.int64), topk, mass)
    return log_softmax(logit_PV), scores.topk_count, scores.topk_logprob, scores.tail_logprob


@pytest.mark.parametrize("mass", [1.0, 0.9, 0.5])
def test_a_student_no_worse_than_uniform_hides_at_most_the_bound(mass: float) -> None:
    full, count, top, tail = teacher(mass)
    bound = hidden_from_uniform(count, top, tail, V)
    hidden = []
    for p, logprob in enumerate(full):
        rest = np.sort(logprob)[: V - count[p]]
        within = rest - np.logaddexp.reduce(rest)
        from_uniform = (np.exp(within) * (within + np.log(len(rest)))).sum()
        hidden.append(np.exp(np.logaddexp.reduce(rest)) * from_uniform)
        assert hidden[p] <= bound[p] + 0.005 * np.exp(float(tail[p]))
    assert sum(hidden) > 0.05 * bound.sum(), "and the bound is not of another size"


def test_equal_tokens_hide_nothing_from_uniform() -> None:
    scores = dense_scores(np.zeros((1, V)), np.zeros(1, np.int64), 8, 1.0)
    columns = (scores.topk_count, scores.topk_logprob, scores.tail_logprob)
    assert hidden_from_uniform(*columns, V) == pytest.approx([0], abs=0.003)


def test_where_there_is_no_tail_nothing_is_hidden() -> None:
    _, count, top, tail = teacher(1.0, topk=V)
    assert (hidden_from_uniform(count, top, tail, V) == 0).all()


def test_sums_over_blocks_are_those_of_all_positions() -> None:
    _, count, top, tail = teacher(0.9)
    kept = Kept(V, np.zeros(9, np.int64))
    for rows in (slice(0, 30), slice(30, 80)):
        kept.add(count[rows], top[rows], tail[rows])
    value = kept.as_json()
    entries = count.astype(int)
    assert value["entries"] == {
        "mean": pytest.approx(entries.mean()),
        "p50": np.percentile(entries, 50, method="inverted_cdf"),
        "p95": np.percentile(entries, 95, method="inverted_cdf"),
        "max": entries.max(),
    }
    assert value["entries_left_out"] == (8 - entries).sum() > 0
    assert value["left_out_share"] == pytest.approx(1 - entries.mean() / 8)
    assert value["left_out_raw_bytes_per_position"] == pytest.approx(6 * (8 - entries).mean())
    bound = hidden_from_uniform(count, top, tail, V).mean()
    assert value["mean_hidden_kl_bound_nats"] == pytest.approx(bound)


def test_no_position_has_no_means() -> None:
    value = Kept(V, np.zeros(9, np.int64)).as_json()
    assert np.isnan(value["entries"]["mean"])
    assert np.isnan(value["mean_hidden_kl_bound_nats"])
    assert value["entries_left_out"] == 0
