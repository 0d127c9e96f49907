"""Tiny models that vLLM runs, and one engine of each kind for the whole session, all of them in
this process."""

import os
from importlib.util import find_spec

if find_spec("vllm") is not None:  # this file is read wherever all tests are collected
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than these tests
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or engines share one core

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.teacher import TeacherConfig
from stillroom.cache.vllm_config import VllmConfig
from stillroom.cache.vllm_engine import VllmEngine
from stillroom.cache.vllm_start import start
from stillroom.replay.sampler import SamplerConfig
from tests.conftest import VOCAB, save_tokenizer

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
MAX_LENGTH = 160
PADDING = 10
WINDOW = 200
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
}


def save_model(folder: Path, seed: int, *, padding: int = 0, **settings: Any) -> Path:
    """A random Llama with heads that are wide enough for vLLM, and its tokenizer; rows of its head
    that are no token are the likeliest."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB + padding,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        **{"tie_word_embeddings": True, "bos_token_id": None, "pad_token_id": VOCAB - 4}
        | {"eos_token_id": VOCAB - 4}
        | settings,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        head: Any = model.get_output_embeddings()
        head.weight[VOCAB:] *= 3
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@contextmanager
def in_process() -> Iterator[None]:
    """Engines that are started meanwhile run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IN_PROCESS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _engines_live_on() -> Iterator[None]:
    """An engine that is freed takes the process groups of all others in its process with it."""
    kept = []

    def start_and_keep(*arguments: Any) -> Any:
        engine = start(*arguments)
        kept.append(engine)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillroom.cache.vllm_engine.start", start_and_keep)
        yield


@pytest.fixture(scope="session")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher."""
    return save_model(tmp_path_factory.mktemp("vllm") / "teacher", seed=1)


@pytest.fixture(scope="session")
def padded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is a matrix of its own, and has more rows than there are tokens."""
    folder = tmp_path_factory.mktemp("vllm") / "padded"
    return save_model(folder, seed=2, padding=PADDING, tie_word_embeddings=False)


def teacher_config(folder: Path, **settings: Any) -> TeacherConfig:
    """Settings of a teacher that vLLM runs."""
    vllm = VllmConfig(engine_args=ENGINE_ARGS, max_tokens_in_flight=WINDOW)
    return TeacherConfig(model=str(folder), backend="vllm", vllm=vllm, **settings)


def sampler_config(**settings: Any) -> SamplerConfig:
    """Settings of a student that vLLM runs."""
    vllm = VllmConfig(engine_args=ENGINE_ARGS, max_tokens_in_flight=WINDOW)
    return SamplerConfig(backend="vllm", vllm=vllm, **settings)


@pytest.fixture(scope="session")
def teacher_engine(teacher_model: Path) -> VllmEngine:
    """An engine that scores."""
    from stillroom.cache.vllm_teacher import start_engine

    with in_process():
        return start_engine(inspect_model(str(teacher_model)), teacher_config(teacher_model))


@pytest.fixture(scope="session")
def exact_engine(padded_model: Path) -> VllmEngine:
    """An engine that gives hidden states."""
    from stillroom.cache.vllm_teacher import start_engine

    config = teacher_config(padded_model, exact_tail=True)
    with in_process():
        return start_engine(inspect_model(str(padded_model)), config)


@pytest.fixture(scope="session")
def sampler_engine(padded_model: Path) -> VllmEngine:
    """An engine that samples and tells up to three likeliest tokens."""
    from stillroom.replay.vllm_sampler import start_engine

    with in_process():
        return start_engine(inspect_model(str(padded_model)), sampler_config(extra=3))
