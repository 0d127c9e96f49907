"""The brute-force twin (a module beside the tests), and a small cache of real scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.part import PartMeta, prompt_id, rollout_id
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import TeacherConfig, identity_of
from stillroom.cache.transformers_teacher import TransformersTeacher


@pytest.fixture(scope="session")
def brute_force() -> ModuleType:
    """The NumPy twin of the objectives."""
    path = Path(__file__).with_name("brute_force.py")
    spec = importlib.util.spec_from_file_location("brute_force", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_cache(teacher_dir: Path) -> Callable[..., Cache]:
    """Makes a cache at a root: random token ids as rollouts of policy 0, scored by the teacher."""

    def make(root: Path, **sizes: int) -> Cache:
        return _make_cache(root, teacher_dir, **sizes)

    return make


def _make_cache(root: Path, teacher_dir: Path, *, rows: int = 12, topk: int = 8, seed: int = 0) -> Cache:
    config = TeacherConfig(model=str(teacher_dir), device="cpu")
    files = inspect_model(config.model)
    cache = Cache.create(root, identity_of(files, config, topk, 1.0))
    rng = np.random.default_rng(seed)
    unit = f"{seed:016x}"
    records = []
    for i in range(rows):
        prompt = rng.integers(0, 250, rng.integers(1, 8)).astype(np.uint32)
        completion = rng.integers(0, 250, rng.integers(2, 20)).astype(np.uint32)
        records.append(
            {
                "rollout_id": rollout_id(unit, i),
                "prompt_id": prompt_id(prompt),
                "prompt_name": None,
                "group": i,
                "sample_index": 0,
                "prompt": prompt,
                "completion": completion,
                "scored": None,
                "behaviour_logprob": np.full(len(completion), -3.0, np.float32),
                "teacher_prompt": None,
                "finish_reason": "length",
                "source": "student",
                "policy_version_min": 0,
                "policy_version_max": 0,
                "ends_with_stop": False,
            }
        )
    meta = PartMeta(
        policy_version=0,
        unit=unit,
        tokenizer_fingerprint=files.tokenizer_fingerprint,
        vocab_size=files.vocab_size,
        sampler={"temperature": 1.0},
    )
    cache.add_part(pa.Table.from_pylist(records, PART_SCHEMA), meta)
    score(cache, TransformersTeacher(files, config))
    return cache
