"""Held-out figures against dense distributions of both models, written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.cache.causal_lm import load_causal_lm
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.evaluate import as_json, evaluate
from stillroom.train.student import load_student


def dense(folder: Path, ids: np.ndarray) -> np.ndarray:
    """(T, V) float64 log probabilities of one sequence."""
    model = load_causal_lm(inspect_model(str(folder)), "float32", torch.device("cpu"))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("topk", [8, 262])
def test_means_over_positions(
    tmp_path: Path,
    make_cache: Callable[..., Cache],
    teacher_dir: Path,
    student_dir: Path,
    topk: int,
) -> None:
    """Forward and reverse KL and tail masses equal the sums over buckets of dense rows."""
    cache = make_cache(tmp_path, rows=5, topk=topk)
    snapshot = cache.snapshot()
    student = load_student(inspect_model(str(student_dir)), "float32", torch.device("cpu"))
    replay = StreamConfig(batch_rows=2, max_tokens=64, block_rows=1, window_rows=1)
    evaluation = evaluate(student, cache, snapshot, replay)
    assert (evaluation.rows, evaluation.left_out, evaluation.truncated) == (5, {}, 0)
    measured = evaluation.sources["student"]
    arrays = cache.shard(snapshot.commits[0]).all_rows()
    rows = []
    for i in range(5):
        start, stop = arrays["sequence_start"][i : i + 2]
        ids, first = arrays["token"][start:stop], int(arrays["prompt_length"][i])
        t, s = dense(teacher_dir, ids), dense(student_dir, ids)
        for at in range(first, len(ids)):
            kept = set(np.argsort(-t[at - 1])[:topk].tolist()) | {int(ids[at])}
            inside = np.isin(np.arange(262), list(kept))
            p, q = np.exp(t[at - 1]), np.exp(s[at - 1])
            tp, tq = p[~inside].sum(), q[~inside].sum()
            p_b, q_b = [np.append(x[inside], tail) for x, tail in ((p, tp), (q, tq))]
            if not (~inside).any():
                p_b, q_b = p_b[:-1], q_b[:-1]
            log_ratio = np.log(p_b) - np.log(q_b)
            dense_kl = (p * (t[at - 1] - s[at - 1])).sum()
            buckets_kl = (p_b * log_ratio).sum()
            rows.append((buckets_kl, -(q_b * log_ratio).sum(), tp, tq, dense_kl - buckets_kl))
    assert measured.positions == len(rows) == snapshot.positions
    found = (measured.forward_kl_nats, measured.reverse_kl_nats)
    assert found == pytest.approx(tuple(np.mean(rows, 0)[:2]), rel=2e-3)
    tails = (measured.teacher_tail_mass, measured.student_tail_mass)
    assert tails == pytest.approx(tuple(np.mean(rows, 0)[2:4]), rel=2e-3, abs=1e-9)
    assert measured.hidden_kl_bound_nats >= np.mean(rows, 0)[4] * 0.99 - 1e-6
    assert (measured.hidden_kl_bound_nats > 0) == (topk == 8)


class VocabularyRows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the most rows of the vocabulary, padded or not, that one tensor had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_rows = isinstance(made, torch.Tensor) and made.dim() > 1 and made.shape[-1] in (262, 263)
        if is_rows and made.shape != (32, 262):  # the head, transposed
            self.most = max(self.most, made.numel() // made.shape[-1])
        return made


def test_logits_are_held_for_few_positions(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path
) -> None:
    """With little memory no tensor has a row of the vocabulary for every position of a micro-batch;
    the figures stay the same, and so does the student's mode."""
    cache = make_cache(tmp_path, rows=12, topk=8)
    student = load_student(inspect_model(str(student_dir)), "float32", torch.device("cpu"))
    replay = StreamConfig(batch_rows=12, max_tokens=4096)
    whole = evaluate(student, cache, cache.snapshot(), replay)
    positions = whole.sources["student"].positions
    student.train()
    with VocabularyRows() as seen:  # type: ignore[no-untyped-call]
        found = evaluate(student, cache, cache.snapshot(), replay, max_bytes=8 * 4 * 262 * 10)
    assert student.training
    assert positions > 60
    assert 1 < seen.most <= 10
    assert found.sources.keys() == whole.sources.keys()
    expected = asdict(whole.sources["student"])
    assert asdict(found.sources["student"]) == pytest.approx(expected, rel=1e-5)
    assert found.reverse_kl_nats == pytest.approx(expected["reverse_kl_nats"], rel=1e-5)


@pytest.mark.parametrize("over_long", ["skip", "truncate", "refuse"])
def test_rows_that_are_not_measured_whole_are_counted(
    tmp_path: Path, make_cache: Callable[..., Cache], student_dir: Path, over_long: str
) -> None:
    """Also where fewer are left than make a batch."""
    cache = make_cache(tmp_path, rows=12)
    snapshot = cache.snapshot()
    (commit,) = snapshot.commits
    tokens, prompt, positions = np.array(commit.row_lengths(), np.int64).T
    limit = int(np.sort(tokens)[3])
    student = load_student(inspect_model(str(student_dir)), "float32", torch.device("cpu"))
    replay = StreamConfig(batch_rows=12, max_tokens=limit, over_long=over_long)
    if over_long == "refuse":
        with pytest.raises(InputError, match="at least the longest row's"):
            evaluate(student, cache, snapshot, replay)
        return
    found = evaluate(student, cache, snapshot, replay)
    over, empty = tokens > limit, prompt >= limit
    if over_long == "skip":
        assert found.left_out == {"over_long": over.sum()}
        assert (found.rows, found.truncated) == (12 - over.sum(), 0)
        assert found.sources["student"].positions == positions[~over].sum()
    else:
        assert found.left_out == ({"no_position": empty.sum()} if empty.any() else {})
        assert (found.rows, found.truncated) == (12 - empty.sum(), (over & ~empty).sum())
        kept = np.minimum(tokens, limit) - prompt
        assert found.sources["student"].positions == kept[~empty].sum()
    counts = {"measured": found.rows, "truncated": found.truncated, "left_out": found.left_out}
    plain = as_json(found)
    assert plain["rows"] == counts
    assert plain["student"]["positions"] == found.sources["student"].positions
