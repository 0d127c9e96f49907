"""An ensemble of two engines whose ids are not the student's: from lists that hold the whole
vocabulary it is what transformers mixes exactly, and from shorter ones it is never above that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.ensemble_config import Member
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.load_teacher import inspect_teacher, load_teacher
from stillroom.cache.mapped_teacher import MappedTeacher
from stillroom.cache.match_ids import match_ids
from stillroom.cache.mixed_teacher import MixedTeacher
from stillroom.cache.teacher import ScoreSpec
from tests.conftest import VOCAB
from tests.vllm.conftest import in_process, save_model, teacher_config
from tests.vllm.test_vllm_teacher import NATS, assert_same, in_order, random_rows
from tests.vocabularies import reordered

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
MORE = ["m1", "m2", "m3"]


def test_two_engines_with_other_ids(teacher_model: Path, tmp_path: Path) -> None:
    second = save_model(tmp_path / "second", seed=5)
    first, second = (
        reordered(folder, tmp_path / f"{i}-other", more=MORE, seed=3)
        for i, folder in enumerate((teacher_model, second))
    )
    config = teacher_config(
        first,
        weight=3.0,
        ensemble=(Member(model=str(second)),),
        ensemble_topk=VOCAB + len(MORE),
    )
    files = inspect_teacher(config)
    id_map = match_ids(files, inspect_model(str(teacher_model)))
    assert id_map is not None
    with in_process():
        teacher = load_teacher(files, config, id_map)
    rows, spec = random_rows(0, (2, 40, 17, 90)), ScoreSpec(topk=12, mass=0.9)
    exact = load_teacher(
        files, replace(config, backend="transformers", device="cpu", ensemble_topk=None), id_map
    )
    assert_same(in_order(teacher, rows, spec), in_order(exact, rows, spec), 2e-2)

    assert isinstance(teacher, MappedTeacher)
    mixed = teacher._teacher
    assert isinstance(mixed, MixedTeacher)
    short = MappedTeacher(MixedTeacher(mixed._members, config.shares(), files.vocab_size), id_map)
    whole = in_order(exact, rows, ScoreSpec(topk=VOCAB))
    for found, every in zip(in_order(short, rows, ScoreSpec(topk=12)), whole, strict=True):
        true = np.full((len(every.topk_id), VOCAB), -np.inf)
        np.put_along_axis(true, every.topk_id.astype(int), every.topk_logprob.astype(float), 1)
        at = np.take_along_axis(true, found.topk_id.astype(int), 1)
        low = at - found.topk_logprob.astype(float)
        assert low.min() > -2e-2
        assert low.max() > 2e-2, "lists of 24 leave something out"
        assert np.abs(found.sampled_logprob - every.sampled_logprob).max() < NATS
