"""A student that is looked up where it runs must be the one that is meant."""

from pathlib import Path

import pytest

from stillroom.cache.errors import MismatchError
from stillroom.cache.fingerprint import inspect_model
from stillroom.replay.load_sampler import find_and_load_sampler
from stillroom.replay.sampler import SamplerConfig


def test_another_student_than_the_one_that_is_meant_is_refused(
    student_dir: Path, teacher_dir: Path
) -> None:
    config, meant = SamplerConfig(device="cpu"), inspect_model(str(student_dir)).fingerprint
    assert find_and_load_sampler(str(student_dir), meant, config)
    with pytest.raises(MismatchError, match=f"on this machine: expected {meant}; got "):
        find_and_load_sampler(str(teacher_dir), meant, config)
