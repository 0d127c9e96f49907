"""A teacher that knows the same tokens by other ids, and more: in a student's ids it gives what the
original gives, to the last digit that is stored, with its own tokens in the tail."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stillroom.cache.ensemble_config import Member
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.load_teacher import inspect_teacher, load_teacher
from stillroom.cache.match_ids import match_ids
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from tests.conftest import VOCAB
from tests.vocabularies import reordered


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(extra: int = 0) -> list[ScoreRow]:
    """Rows of the student's ids."""
    rng = np.random.default_rng(0)
    return [
        ScoreRow(
            rng.integers(0, VOCAB, n).astype(np.uint32),
            np.arange(1, n),
            rng.integers(0, VOCAB, (n - 1, extra)).astype(np.uint32) if extra else None,
            n,
        )
        for n in (9, 5)
    ]


def run(
    config: TeacherConfig, student: Path, rows: list[ScoreRow], spec: ScoreSpec
) -> list[RowScores]:
    """Scores in the student's ids."""
    files = inspect_teacher(config)
    id_map = match_ids(files, inspect_model(str(student)))
    found = dict(load_teacher(files, config, id_map).score(rows, spec))
    return [found[i] for i in range(len(rows))]


def config_of(*models: Path) -> TeacherConfig:
    """One model, or an ensemble."""
    first, *others = map(str, models)
    members = tuple(Member(model=model) for model in others)
    return TeacherConfig(model=first, ensemble=members, device="cpu", head_rows=4)


@pytest.mark.parametrize(
    "spec",
    [
        ScoreSpec(topk=8),
        ScoreSpec(topk=8, temperature=0.5, mass=0.4),
        ScoreSpec(topk=8, extra=3, extra_kind="student"),
        ScoreSpec(topk=8, extra=3, extra_kind="tail"),
    ],
)
def test_another_order_gives_the_same_scores(
    teacher_dir: Path, student_dir: Path, tmp_path: Path, spec: ScoreSpec
) -> None:
    other = reordered(teacher_dir, tmp_path / "other", padding=5)
    rows = rows_of(3 if spec.extra_kind == "student" else 0)
    pairs = zip(
        run(config_of(teacher_dir), student_dir, rows, spec),
        run(config_of(other), student_dir, rows, spec),
        strict=True,
    )
    for expected, found in pairs:
        assert (
            found.topk_id == expected.topk_id
        ).mean() > 0.95  # ties of float16 may change places
        np.testing.assert_allclose(found.topk_logprob, expected.topk_logprob, rtol=1e-3)
        np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)
        if spec.extra_kind == "student":
            assert found.extra_logprob is not None
            assert expected.extra_logprob is not None
            np.testing.assert_allclose(found.extra_logprob, expected.extra_logprob, rtol=1e-3)
        if spec.extra_kind == "tail":
            assert found.extra_id is not None
            assert expected.extra_id is not None
            assert (found.extra_id < VOCAB).all()


def test_a_superset_keeps_its_own_tokens_in_the_tail(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    """Against the teacher's own scores of its whole vocabulary."""
    more = [f"more{i}" for i in range(40)]
    other = reordered(teacher_dir, tmp_path / "other", more=more)
    files, rows, size = inspect_model(str(other)), rows_of(), VOCAB + 40
    id_map = match_ids(files, inspect_model(str(student_dir)))
    assert id_map is not None
    assert len(id_map.teacher_only) == 40
    config = config_of(other)
    own_rows = [ScoreRow(id_map.to_teacher(row.token), row.targets) for row in rows]
    whole = dict(load_teacher(files, config).score(own_rows, ScoreSpec(topk=size)))
    for index, found in enumerate(run(config, student_dir, rows, ScoreSpec(topk=8))):
        every = np.full((len(rows[index].targets), size), -np.inf)
        logprob = whole[index].topk_logprob.astype(float)
        np.put_along_axis(every, whole[index].topk_id.astype(int), logprob, 1)
        assert every[:, id_map.teacher_only].max() > every[:, id_map.teacher_id].max(1).min(), (
            "somewhere the likeliest token is the teacher's own"
        )
        own = every[:, id_map.teacher_id]
        best = -np.sort(-own, 1)[:, :8]
        np.testing.assert_allclose(found.topk_logprob, best, rtol=1e-3)
        at = np.take_along_axis(own, found.topk_id.astype(int), 1)
        np.testing.assert_allclose(found.topk_logprob, at, rtol=1e-3)
        tail = np.log(1 - np.exp(best).sum(1))
        np.testing.assert_allclose(found.tail_logprob, tail, atol=2e-3)
        np.testing.assert_allclose(found.sampled_logprob, whole[index].sampled_logprob, atol=1e-5)


def test_an_ensemble_with_another_order(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    first, second = (
        reordered(folder, tmp_path / name)
        for folder, name in ((teacher_dir, "a"), (student_dir, "b"))
    )
    rows, spec = rows_of(), ScoreSpec(topk=6)
    pairs = zip(
        run(config_of(teacher_dir, student_dir), student_dir, rows, spec),
        run(config_of(first, second), student_dir, rows, spec),
        strict=True,
    )
    for expected, found in pairs:
        np.testing.assert_allclose(found.topk_logprob, expected.topk_logprob, rtol=1e-3)
        np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)


def test_another_padding_than_the_students(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    """The tokenizer is the same; only the head has more rows."""
    import shutil

    from safetensors.numpy import load_file, save_file

    from tests.vocabularies import EMBEDDING, change_json

    padded = shutil.copytree(teacher_dir, tmp_path / "padded")
    tensors = load_file(padded / "model.safetensors")
    filler = np.full((11, tensors[EMBEDDING].shape[1]), 3.0, np.float32)
    tensors[EMBEDDING] = np.concatenate([tensors[EMBEDDING], filler])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    change_json(padded / "config.json", vocab_size=VOCAB + 11)
    assert match_ids(inspect_model(str(padded)), inspect_model(str(student_dir))) is None
    rows, spec = rows_of(), ScoreSpec(topk=8)
    pairs = zip(
        *(run(config_of(folder), student_dir, rows, spec) for folder in (teacher_dir, padded)),
        strict=True,
    )
    for expected, found in pairs:
        assert (found.topk_id == expected.topk_id).mean() > 0.95
        np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)
