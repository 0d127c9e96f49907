"""Ensembles of full vocabularies: the exact mixture, whatever the members' sizes and paddings."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.cache.ensemble_config import Member
from stillroom.cache.errors import InputError, NumericsError
from stillroom.cache.load_teacher import inspect_teacher, load_teacher
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from tests.cache.fakes import dense_scores
from tests.conftest import VOCAB, save_llama


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member with a padded head and another depth."""
    folder = tmp_path_factory.mktemp("members") / "padded"
    return save_llama(folder, seed=7, width=VOCAB + 9, layers=1, scale=0.5)


def config_of(*models: Path, weights: list[float]) -> TeacherConfig:
    """An ensemble on the CPU, a few positions at a time."""
    first, *others = zip(map(str, models), weights, strict=True)
    members = tuple(Member(model=model, weight=weight) for model, weight in others)
    return TeacherConfig(
        model=first[0], weight=first[1], ensemble=members, device="cpu", head_rows=3
    )


def run(config: TeacherConfig, rows: list[ScoreRow], spec: ScoreSpec) -> list[RowScores]:
    """Scores in the order of the rows."""
    found = dict(load_teacher(inspect_teacher(config), config).score(rows, spec))
    return [found[i] for i in range(len(rows))]


def rows_of(*lengths: int) -> list[ScoreRow]:
    """Random ids, all but the first scored."""
    rng = np.random.default_rng(0)
    return [ScoreRow(rng.integers(0, VOCAB, n).astype(np.uint32), np.arange(1, n)) for n in lengths]


def all_logprobs(folder: Path, row: ScoreRow, temperature: float) -> np.ndarray:
    """(p, VOCAB) float64 from the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(row.token.astype(np.int64))[None]).logits[0].double()
    logits = logits[row.targets - 1, :VOCAB] / temperature
    return np.asarray(logits.log_softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_ensemble_is_the_exact_mixture(
    teacher_dir: Path, student_dir: Path, padded: Path, temperature: float
) -> None:
    folders, weights = (teacher_dir, padded, student_dir), [2.0, 5.0, 1.0]
    rows = rows_of(9, 4)
    spec = ScoreSpec(topk=12, temperature=temperature)
    for row, scores in zip(
        rows, run(config_of(*folders, weights=weights), rows, spec), strict=True
    ):
        parts = [
            np.log(weight / 8) + all_logprobs(folder, row, temperature)
            for folder, weight in zip(folders, weights, strict=True)
        ]
        mixed = np.logaddexp.reduce(parts)
        expected = dense_scores(mixed, row.token[row.targets], 12)
        probability = np.take_along_axis(mixed, scores.topk_id.astype(int), 1)
        np.testing.assert_allclose(scores.topk_logprob, probability, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scores.topk_logprob, expected.topk_logprob, rtol=2e-3)
        np.testing.assert_allclose(scores.tail_logprob, expected.tail_logprob, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(scores.sampled_logprob, expected.sampled_logprob, atol=1e-4)


def test_a_model_with_itself_is_the_model(teacher_dir: Path) -> None:
    rows, spec = rows_of(8), ScoreSpec(topk=6, mass=0.5, extra=2, extra_kind="tail")
    alone = TeacherConfig(model=str(teacher_dir), device="cpu")
    (expected,), (found,) = (
        run(config, rows, spec)
        for config in (alone, config_of(teacher_dir, teacher_dir, weights=[1.0, 3.0]))
    )
    assert (found.topk_id == expected.topk_id).all()
    assert np.mean(found.extra_id == expected.extra_id) > 0.9
    assert (found.topk_id != UNUSED_ID).any(1).all()
    np.testing.assert_allclose(found.topk_logprob, expected.topk_logprob, rtol=1e-3)
    np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)


def test_the_class_and_the_longest_row_are_those_of_all(teacher_dir: Path, tmp_path: Path) -> None:
    from tests.vocabularies import change_json

    short = save_llama(tmp_path / "short", seed=3)
    change_json(short / "config.json", max_position_embeddings=32)
    config = config_of(teacher_dir, short, weights=[1.0, 1.0])
    teacher = load_teacher(inspect_teacher(config), config)
    assert teacher.numeric_class.startswith("ensemble-2-transformers-")
    with pytest.raises(InputError, match="expected at most the teacher's 32 tokens; got 33"):
        next(teacher.score(rows_of(33), ScoreSpec(topk=2)))


def test_a_member_that_gives_nan_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = save_llama(tmp_path / "broken", seed=3)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"^row 0: expected finite teacher logits"):
        run(config_of(teacher_dir, broken, weights=[1.0, 1.0]), rows_of(5), ScoreSpec(topk=2))
