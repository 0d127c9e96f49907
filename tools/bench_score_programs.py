"""The programs whose scoring is measured, over the same rows: a bare forward, the transformers
teacher, and vLLM's engine with and without what it costs to make scores of its answers."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.teacher import ScoreRow, ScoreSpec, stats_of
from stillroom.cache.transformers_teacher import TransformersTeacher, length_batches
from stillroom.tools.bench_score_rows import Scored
from stillroom.tools.bench_train_turns import Turn


def bare_forward(turn: Turn, scored: Scored) -> None:
    """Forward, head and the K largest logits: the least that a teacher can do. Nothing is
    normalised, rounded or ordered."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(scored.threads)
    config = scored.config
    dtype = getattr(torch, config.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype).eval()
    batches = length_batches([len(row.token) for row in scored.rows], config.max_batch_tokens)
    while turn.next():
        for batch in batches:
            _bare_batch(model, [scored.rows[i] for i in batch], scored)


@torch.inference_mode()
def _bare_batch(model: Any, rows: Sequence[ScoreRow], scored: Scored) -> list[torch.Tensor]:
    width = max(len(row.token) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.token)] = row.token
    hidden = model.base_model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
    picked = torch.cat([hidden[i, torch.from_numpy(row.targets - 1)] for i, row in enumerate(rows)])
    head = model.get_output_embeddings()
    parts = torch.split(picked, scored.config.head_rows)
    found = [head(part).float().topk(scored.topk) for part in parts]
    return [part for pair in found for part in pair]


def transformers_teacher(turn: Turn, scored: Scored) -> None:
    """The transformers teacher; notes how long its model ran, too."""
    torch.set_num_threads(scored.threads)
    teacher = TransformersTeacher(inspect_model(scored.config.model), scored.config)
    before = 0.0
    while turn.next():
        _drain(teacher, scored)
        now = stats_of(teacher)["model_s"]
        turn.note("model_s", now - before)
        before = now


def vllm_plain(turn: Turn, scored: Scored) -> None:
    """One engine: the prompts alone, prompt logprobs thrown away, and the teacher; notes each."""
    from stillroom.cache.vllm_teacher import VllmTeacher, start_engine

    _one_process(scored.threads)
    files = inspect_model(scored.config.model)
    engine = start_engine(files, scored.config)
    teacher = VllmTeacher(files, scored.config, engine)
    alone = {"max_tokens": 1, "temperature": 0.0}

    def ask(**more: int) -> None:
        for _ in engine.run(_requests(scored, alone | more)):
            pass

    while turn.next():
        _note(turn, "prefill_s", ask)
        with _thrown_away(engine):
            _note(turn, "thrown_away_s", lambda: ask(prompt_logprobs=scored.topk))
        _note(turn, "teacher_s", lambda: _drain(teacher, scored))


def vllm_exact(turn: Turn, scored: Scored) -> None:
    """The teacher that takes hidden states from vLLM."""
    from stillroom.cache.vllm_teacher import VllmTeacher

    _one_process(scored.threads)
    config = replace(scored.config, exact_tail=True)
    teacher = VllmTeacher(inspect_model(config.model), config)
    while turn.next():
        _drain(teacher, scored)


def _one_process(threads: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(threads)


def _requests(scored: Scored, params: dict[str, Any]) -> list[Any]:
    from stillroom.cache.vllm_engine import VllmRequest

    return [VllmRequest(i, row.token, params) for i, row in enumerate(scored.rows)]


@contextmanager
def _thrown_away(engine: Any) -> Iterator[None]:
    """The engine's arrays are dropped as they come."""
    keep = engine._with_arrays

    def drop(output: Any) -> Any:
        engine._kept.pop(output.request_id, None)
        return output

    engine._with_arrays = drop
    try:
        yield
    finally:
        engine._with_arrays = keep


def _note(turn: Turn, name: str, run: Callable[[], None]) -> None:
    start = time.perf_counter()
    run()
    turn.note(name, time.perf_counter() - start)


def _drain(teacher: Any, scored: Scored) -> None:
    for _ in teacher.score(scored.rows, ScoreSpec(topk=scored.topk)):
        pass
