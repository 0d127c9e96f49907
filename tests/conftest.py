"""Fixtures shared by all tests: tiny random models with a byte tokenizer, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

if TYPE_CHECKING:
    from stillroom.cache.store import Cache
    from tests.cache.s3 import S3

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes, a few merges, four special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c")]
    vocab = {token: i for i, token in enumerate([*alphabet, "ab", "abc"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)


VOCAB = 256 + 2 + len(SPECIALS)


def save_llama(
    folder: Path,
    seed: int,
    *,
    scale: float = 0.3,
    width: int = VOCAB,
    layers: int = 2,
    tied: bool = True,
) -> Path:
    """A random Llama of a few thousand weights, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=width,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=VOCAB - 4,
        pad_token_id=VOCAB - 4,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher."""
    return save_llama(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student with the teacher's tokenizer."""
    return save_llama(tmp_path_factory.mktemp("models") / "student", seed=2)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"prompt_name": f"p{i}", "prompt": f"count {i}: abc " + "x" * (i % 4)} for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_cache(teacher_dir: Path) -> Callable[..., Cache]:
    """Makes a cache at a root: random token ids as rollouts of policy 0, scored by the teacher;
    `samples` of each prompt, two thirds of their tokens unscored if `masked`, and with a weight of
    each row, `x_weight`, if `weighted`."""

    def make(root: Path, **sizes: int) -> Cache:
        return _make_cache(root, teacher_dir, **sizes)

    return make


def _make_cache(
    root: Path,
    teacher_dir: Path,
    *,
    rows: int = 12,
    topk: int = 8,
    seed: int = 0,
    samples: int = 1,
    masked: int = 0,
    weighted: int = 0,
) -> Cache:
    from stillroom.cache.fingerprint import inspect_model
    from stillroom.cache.part import PartMeta, prompt_id, rollout_id
    from stillroom.cache.schema import PART_SCHEMA
    from stillroom.cache.score import score
    from stillroom.cache.store import Cache
    from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
    from stillroom.cache.transformers_teacher import TransformersTeacher

    config = TeacherConfig(model=str(teacher_dir), device="cpu")
    files = inspect_model(config.model)
    cache = Cache.create(root, identity_of(files, config, ScoreSpec(topk=topk)))
    rng = np.random.default_rng(seed)
    unit = f"{seed:016x}"
    records = []
    for i in range(rows):
        if i % samples == 0:
            prompt = rng.integers(0, 250, rng.integers(1, 8)).astype(np.uint32)
        completion = rng.integers(0, 250, rng.integers(2, 20)).astype(np.uint32)
        records.append(
            {
                "rollout_id": rollout_id(unit, i),
                "prompt_id": prompt_id(prompt),
                "prompt_name": None,
                "group": i // samples,
                "sample_index": i % samples,
                "prompt": prompt,
                "completion": completion,
                "scored": (np.arange(len(completion)) % 3 == i % 2) if masked else None,
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
    table = pa.Table.from_pylist(records, PART_SCHEMA)
    if weighted:
        weights = pa.array(np.arange(rows) % 3 / 2, pa.float32())
        table = table.append_column("x_weight", weights)
    cache.add_part(table, meta)
    score(cache, TransformersTeacher(files, config))
    return cache


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """An S3 server for the whole session."""
    from tests.cache.s3 import serving

    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The S3 server, well behaved, and this process's environment set for it."""
    s3_server.proxy.behave()
    s3_server.enter(monkeypatch)
    return s3_server
