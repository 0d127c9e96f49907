"""Settings of a teacher, and the identity that follows from its files."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.teacher import DTYPES, ScoreSpec, TeacherConfig, identity_of

FILES = ModelFiles(
    folder=Path("/models/teacher"),
    config={},
    fingerprint="f",
    weight_format="BF16",
    tokenizer_fingerprint="t",
    vocab_size=50,
    logit_width=64,
    max_length=128,
)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "int8"}, r"^teacher\.dtype: expected one of .*; got 'int8'"),
        ({"max_batch_tokens": 0}, r"^teacher\.max_batch_tokens"),
        ({"head_rows": -1}, r"teacher\.head_rows: expected at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TeacherConfig(model="m", **changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_says_what_scores_depend_on(dtype: str) -> None:
    config = TeacherConfig(model="org/name", revision="main", dtype=dtype, device="cpu")
    assert identity_of(FILES, config, ScoreSpec(topk=8, temperature=0.5)) == Identity(
        teacher=TeacherId(
            name="org/name",
            revision="main",
            weight_format="BF16",
            compute_dtype=dtype,
            fingerprint="f",
        ),
        tokenizer_fingerprint="t",
        vocab_size=50,
        logit_width=64,
        max_length=128,
        temperature=0.5,
        topk=8,
    )


def test_what_only_costs_time_is_not_in_the_identity() -> None:
    quick = TeacherConfig(model="m", device="cuda:1", max_batch_tokens=1, head_rows=1)
    spec = ScoreSpec(topk=8)
    assert identity_of(FILES, quick, spec) == identity_of(FILES, TeacherConfig(model="m"), spec)


@pytest.mark.parametrize(("topk", "temperature"), [(51, 1.0), (0, 1.0), (8, 0.0), (8, -1.0)])
def test_settings_that_do_not_fit_the_teacher_are_refused(topk: int, temperature: float) -> None:
    with pytest.raises(ConfigError):
        identity_of(FILES, TeacherConfig(model="m"), ScoreSpec(topk=topk, temperature=temperature))
