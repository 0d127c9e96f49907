"""Scores by vLLM are those of transformers: of the K likeliest tokens as the engine tells them, and
of anything by way of its hidden states."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, InputError, NumericsError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from stillroom.cache.vllm_config import VllmConfig
from stillroom.cache.vllm_engine import VllmEngine, VllmRequest
from stillroom.cache.vllm_teacher import VllmTeacher, start_engine
from tests.conftest import VOCAB
from tests.vllm.conftest import MAX_LENGTH, WINDOW, in_process, save_model, teacher_config

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
NATS = 5e-4
HALF = 2**-10
TOPK = 16


def random_rows(seed: int, lengths: tuple[int, ...], extra: int = 0) -> list[ScoreRow]:
    """Rows of which every third token or so is not scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        token = rng.integers(0, VOCAB, length).astype(np.uint32)
        targets = np.flatnonzero(rng.random(length - 1) < 0.7) + 1
        targets = targets if len(targets) else np.array([length - 1])
        ids = rng.integers(0, VOCAB, (len(targets), extra)).astype(np.uint32)
        ids[::3, -1:] = UNUSED_ID
        rows.append(ScoreRow(token, targets, ids if extra else None, seed + length))
    return rows


ROWS = random_rows(0, (2, 3, 40, MAX_LENGTH, 17, 90, MAX_LENGTH, 5, 64, 33))


def reference(folder: Path, rows: list[ScoreRow], spec: ScoreSpec) -> list[RowScores]:
    """What transformers says."""
    from stillroom.cache.transformers_teacher import TransformersTeacher

    config = TeacherConfig(model=str(folder), device="cpu")
    return in_order(TransformersTeacher(inspect_model(str(folder)), config), rows, spec)


def in_order(teacher: Any, rows: list[ScoreRow], spec: ScoreSpec) -> list[RowScores]:
    """Scores in the order of the rows; each row comes once."""
    found = list(teacher.score(rows, spec))
    assert sorted(i for i, _ in found) == list(range(len(rows)))
    by_row = dict(found)
    return [by_row[i] for i in range(len(rows))]


def close(a: np.ndarray, b: np.ndarray, nats: float) -> bool:
    """Whether logprobs agree, as far as storage keeps them; -inf and NaN where the other has it."""
    nats = nats + (HALF * np.abs(b).max(initial=0, where=np.isfinite(b)))
    return np.allclose(a.astype(np.float64), b.astype(np.float64), 0, nats, equal_nan=True)


def assert_same(ours: list[RowScores], theirs: list[RowScores], tail_nats: float = NATS) -> None:
    """Entries may change places where they are as likely as each other."""
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.sampled_logprob - b.sampled_logprob).max() < NATS
        assert a.topk_count.tolist() == b.topk_count.tolist()
        assert close(a.topk_logprob, b.topk_logprob, NATS)
        assert np.mean(a.topk_id == b.topk_id) > 0.98
        assert close(a.tail_logprob, b.tail_logprob, tail_nats)
        for name in ("extra_id", "extra_logprob", "extra_behaviour_logprob"):
            first, second = getattr(a, name), getattr(b, name)
            assert (first is None) == (second is None)
            if first is not None and name == "extra_id":
                assert (first == second).all()
            elif first is not None:
                assert close(first, second, NATS)


@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_scores_are_those_of_transformers(
    teacher_engine: VllmEngine, teacher_model: Path, mass: float
) -> None:
    config = teacher_config(teacher_model)
    teacher = VllmTeacher(inspect_model(str(teacher_model)), config, teacher_engine)
    spec = ScoreSpec(topk=TOPK, mass=mass)
    assert_same(in_order(teacher, ROWS, spec), reference(teacher_model, ROWS, spec))
    assert teacher.numeric_class.startswith("vllm-0.32.0-float32-")


def test_arrays_and_lists_hold_the_same_bits(
    teacher_engine: VllmEngine, teacher_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists are vLLM's public answer; other users of vLLM here still get them."""
    config = teacher_config(teacher_model)
    teacher = VllmTeacher(inspect_model(str(teacher_model)), config, teacher_engine)
    spec = ScoreSpec(topk=TOPK)
    arrays = in_order(teacher, ROWS, spec)
    params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": TOPK}
    request = VllmRequest(0, ROWS[4].token, params)
    ((_, own),) = teacher_engine.run([request])
    assert own.prompt_logprobs.logprob.shape == (16, 1 + TOPK)
    monkeypatch.setattr(teacher_engine, "_as_arrays", False)
    ((_, public),) = teacher_engine.run([request])
    assert type(public.prompt_logprobs).__name__ == "FlatLogprobs"
    for one, other in zip(arrays, in_order(teacher, ROWS, spec), strict=True):
        for field in fields(RowScores):
            first, second = getattr(one, field.name), getattr(other, field.name)
            assert (first is None and second is None) or first.tobytes() == second.tobytes()


def test_the_engine_knows_of_a_bounded_number_of_tokens(
    teacher_engine: VllmEngine, teacher_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = teacher_config(teacher_model)
    teacher = VllmTeacher(inspect_model(str(teacher_model)), config, teacher_engine)
    rows = [*random_rows(3, (10,) * 30), *ROWS]
    inside: list[int] = []
    engine = teacher_engine._engine
    step = engine.step

    def counted() -> Any:
        states = engine.output_processor.request_states.values()
        inside.append(sum(len(state.prompt_token_ids) + 1 for state in states))
        return step()

    monkeypatch.setattr(engine, "step", counted)
    scores: Any = teacher.score(rows, ScoreSpec(topk=2))
    next(scores)
    assert engine.has_unfinished_requests()
    scores.close()
    assert not engine.has_unfinished_requests()
    assert teacher_engine._kept == {}
    assert len(in_order(teacher, rows, ScoreSpec(topk=2))) == len(rows)
    assert inside[0] == WINDOW // 11 * 11
    assert max(inside) <= WINDOW


def test_what_needs_the_full_vocabulary_is_refused(
    teacher_engine: VllmEngine, teacher_model: Path, padded_model: Path
) -> None:
    files = inspect_model(str(teacher_model))
    teacher = VllmTeacher(files, teacher_config(teacher_model), teacher_engine)
    specs = [
        ScoreSpec(topk=4, temperature=0.5),
        ScoreSpec(topk=4, extra=2, extra_kind="tail"),
    ]
    if not teacher_engine.scores_given_ids:
        specs.append(ScoreSpec(topk=4, extra=2, extra_kind="student"))
    for spec in specs:
        with pytest.raises(ConfigError, match=r"teacher\.exact_tail: true"):
            list(teacher.score(ROWS, spec))
    with pytest.raises(ConfigError, match="exact_tail"):
        VllmTeacher(inspect_model(str(padded_model)), teacher_config(padded_model))


def test_ids_of_the_student_are_scored_where_the_engine_can(
    teacher_engine: VllmEngine, teacher_model: Path
) -> None:
    if not teacher_engine.scores_given_ids:
        pytest.skip("only engines on GPUs are asked for single ids")
    files, rows = inspect_model(str(teacher_model)), random_rows(4, (2, 40, 17), extra=3)
    teacher = VllmTeacher(files, teacher_config(teacher_model), teacher_engine)
    spec = ScoreSpec(topk=TOPK, extra=3, extra_kind="student")
    assert_same(in_order(teacher, rows, spec), reference(teacher_model, rows, spec))


def test_a_row_that_is_too_long_is_named(teacher_engine: VllmEngine, teacher_model: Path) -> None:
    files = inspect_model(str(teacher_model))
    teacher = VllmTeacher(files, teacher_config(teacher_model), teacher_engine)
    rows = [*ROWS, *random_rows(1, (MAX_LENGTH + 1,))]
    with pytest.raises(InputError, match=f"row {len(ROWS)}: expected at most {MAX_LENGTH} tokens"):
        next(teacher.score(rows, ScoreSpec(topk=4)))


@pytest.mark.parametrize(
    "spec",
    [
        ScoreSpec(topk=TOPK),
        ScoreSpec(topk=TOPK, temperature=0.5, mass=0.8),
        ScoreSpec(topk=4, extra=3, extra_kind="student"),
        ScoreSpec(topk=4, extra=3, extra_kind="tail"),
        ScoreSpec(topk=VOCAB),
    ],
    ids=["plain", "cool", "student", "tail", "all"],
)
def test_exact_scores_are_those_of_transformers(
    exact_engine: VllmEngine, padded_model: Path, spec: ScoreSpec
) -> None:
    config = teacher_config(padded_model, exact_tail=True, head_rows=7)
    teacher = VllmTeacher(inspect_model(str(padded_model)), config, exact_engine)
    assert teacher.numeric_class.endswith("-hidden")
    rows = random_rows(2, (2, 40, MAX_LENGTH, 17, 90), spec.extra)
    assert_same(in_order(teacher, rows, spec), reference(padded_model, rows, spec))


def test_settings_that_vllm_refuses_say_why(teacher_model: Path) -> None:
    files = inspect_model(str(teacher_model))
    cases = {
        "unknown argument": ({"no_such_argument": 1}, "no_such_argument"),
        "memory": ({"kv_cache_memory_bytes": 4096}, "cache blocks"),
        "processes": ({"tensor_parallel_size": 3}, "divisible by tensor parallel"),
    }
    for arguments, named in cases.values():
        config = teacher_config(teacher_model)
        given = {**config.vllm.engine_args, **arguments}
        config = replace(config, vllm=VllmConfig(engine_args=given))
        with in_process(), pytest.raises(ConfigError, match=named):
            start_engine(files, config)
    with pytest.raises(ConfigError, match="device"):
        start_engine(files, teacher_config(teacher_model, device="cuda:1"))
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ


def test_nan_is_named(tmp_path: Path, teacher_engine: VllmEngine, teacher_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "nan", seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = inspect_model(str(teacher_model))
    teacher = VllmTeacher(files, teacher_config(teacher_model), teacher_engine)
    teacher_engine.load_weights(folder)
    try:
        with pytest.raises(NumericsError, match="row "):
            list(teacher.score(ROWS[:2], ScoreSpec(topk=4)))
    finally:
        teacher_engine.load_weights(teacher_model)
    spec = ScoreSpec(topk=TOPK)
    assert_same(in_order(teacher, ROWS[:3], spec), reference(teacher_model, ROWS[:3], spec))
