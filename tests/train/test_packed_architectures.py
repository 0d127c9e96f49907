"""Whole models: packed rows are what they are one by one, with shared prompts too, and apart."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from stillroom.cache.errors import ShapeError
from stillroom.replay.batch import MicroBatch, Row, collate
from stillroom.train.attention import NAME
from stillroom.train.student import Student

VOCAB = 40
LENGTHS = [9, 3, 2, 14]
WINDOW = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
HEAD: dict[str, Any] = {**SIZES, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**HEAD),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**HEAD),
    "gemma2": lambda: Gemma2Config(**HEAD, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**HEAD, sliding_window=WINDOW),
    "gpt_oss": lambda: GptOssConfig(
        **HEAD,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default"},
    ),
}
NEEDS_EAGER = ("gemma2", "gpt_oss")  # transformers' fused attention has no soft-cap and no sinks
architectures = pytest.mark.parametrize("architecture", CONFIGS)
checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose attention is far from even."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    return model


def make_student(architecture: str, dtype: torch.dtype = torch.float32) -> Student:
    """Such a model, packed."""
    model = make_model(CONFIGS[architecture](), dtype)
    model.set_attn_implementation(NAME)
    return Student(model)


def make_row(number: int, token: np.ndarray, prompt: int = 1) -> Row:
    """A row of these tokens, all of whose completion is scored."""
    count = len(token) - prompt
    arrays: dict[str, np.ndarray] = {
        "token": token.astype(np.uint32),
        "scored": (np.arange(len(token)) >= prompt).astype(np.uint16),
        "prompt_length": np.array([prompt], np.uint32),
        "topk_id": np.zeros((count, 1), np.uint32),
        "topk_logprob": np.zeros((count, 1), np.float16),
        "tail_logprob": np.zeros(count, np.float16),
        "sampled_logprob": np.zeros(count, np.float32),
        "behaviour_logprob": np.zeros(count, np.float32),
        "policy_version_min": np.array([0], np.int32),
        "source": np.array([1], np.uint16),
    }
    return Row(number, arrays, 1.0)


def make_rows() -> list[np.ndarray]:
    """Token ids of rows of different lengths."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, length) for length in LENGTHS]


def pack_rows(rows: list[np.ndarray]) -> MicroBatch:
    """All of them; every token but a row's first one is scored."""
    return collate([make_row(i, row) for i, row in enumerate(rows)])


def by_row(logits: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """The scored positions of each row."""
    return list(torch.split(logits, [length - 1 for length in lengths]))


def alone(architecture: str, dtype: torch.dtype, rows: list[np.ndarray]) -> tuple[Any, Any]:
    """The model with transformers' own attention, and its logits of each row by itself."""
    model = make_model(CONFIGS[architecture](), dtype)
    model.set_attn_implementation("eager" if architecture in NEEDS_EAGER else "sdpa")
    ids = (torch.from_numpy(row)[None] for row in rows)
    return model, [model(one, use_cache=False).logits[0, :-1] for one in ids]


@architectures
@checkpointing
def test_packed_logits_equal_those_of_the_rows_one_by_one(
    architecture: str, checkpointing: bool
) -> None:
    """Not to the bit: matrix products of other shapes add in another order."""
    rows, student = make_rows(), make_student(architecture).train()
    if checkpointing:
        student.model.gradient_checkpointing_enable()
    packed = by_row(student(pack_rows(rows)).detach(), LENGTHS)
    singles = (single.detach() for single in alone(architecture, torch.float32, rows)[1])
    for single, found in zip(singles, packed, strict=True):
        tolerance = 3e-6 * float(single.abs().max())
        torch.testing.assert_close(found, single, rtol=0, atol=tolerance)


def with_input_gradients(student: Student, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (P, V), and the gradient (T, H) of the sum of their squares to the embeddings."""
    held: list[torch.Tensor] = []
    embedding = student.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, _in, out: held.append(out))
    logits = student(batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), held)
    return logits.detach(), gradient[0]


@architectures
def test_a_row_is_the_same_to_the_bit_whatever_the_others_hold(architecture: str) -> None:
    student, rows = make_student(architecture), make_rows()

    def values(rows: list[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        logits, gradient = with_input_gradients(student, pack_rows(rows))
        return list(zip(by_row(logits, LENGTHS), torch.split(gradient, LENGTHS), strict=True))

    before = values(rows)
    for changed in range(len(rows)):
        after = values([(row + 1) % VOCAB if i == changed else row for i, row in enumerate(rows)])
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
            assert same == [i != changed] * 2


@architectures
@torch.no_grad()
def test_a_token_does_not_see_what_comes_after_it(architecture: str) -> None:
    student, rows = make_student(architecture), make_rows()
    before = student(pack_rows(rows))
    later = rows[0].copy()
    later[5:] = (later[5:] + 1) % VOCAB
    after = student(pack_rows([later, *rows[1:]]))
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:8], after[5:8])
    assert torch.equal(before[8:], after[8:])


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter, for a fixed weighting of the logits."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    model.zero_grad()
    torch.autograd.backward((logits * weight).sum())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Within a part of each parameter's largest gradient."""
    for name, gradient in found.items():
        atol = tolerance * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=atol, msg=name)


@architectures
@checkpointing
def test_gradients_equal_those_of_the_rows_one_by_one(
    architecture: str, checkpointing: bool
) -> None:
    """Gemma's norms sum in float32 whatever the dtype is; experts run in float32 only."""
    dtype, tolerance = torch.float64, 1e-6 if architecture.startswith("gemma") else 1e-12
    if architecture == "gpt_oss":
        dtype, tolerance = torch.float32, 1e-5
    rows = make_rows()
    model, logits = alone(architecture, dtype, rows)
    expected = gradients(model, torch.cat(logits))
    student = make_student(architecture, dtype).train()
    if checkpointing:
        student.model.gradient_checkpointing_enable()
    found = gradients(student.model, student(pack_rows(rows)))
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_window_shorter_than_a_row_is_kept(architecture: str) -> None:
    windowed, wide = make_student(architecture), CONFIGS[architecture]()
    wide.sliding_window = 64
    model = make_model(wide)
    model.set_attn_implementation(NAME)
    batch = pack_rows(make_rows())
    near, far = (by_row(s(batch), LENGTHS) for s in (windowed, Student(model)))
    for i, length in enumerate(LENGTHS):
        assert torch.equal(near[i], far[i]) == (length - 1 <= WINDOW)
        assert torch.allclose(near[i][:WINDOW], far[i][:WINDOW], rtol=0, atol=1e-5)


GROUPS = [0, 0, 0, 1, 2, 2]
PROMPTS = [6, 6, 6, 2, 5, 5]
COMPLETIONS = [4, 1, 7, 3, 2, 6]


def make_rollouts() -> list[Row]:
    """Three of one prompt, one of another, two of a third; prompts are longer than the window."""
    rng = np.random.default_rng(3)
    prompts = {group: rng.integers(0, VOCAB, 6) for group in GROUPS}
    return [
        make_row(i, np.concatenate([prompts[group][:p], rng.integers(0, VOCAB, c)]), p)
        for i, (group, p, c) in enumerate(zip(GROUPS, PROMPTS, COMPLETIONS, strict=True))
    ]


@architectures
@checkpointing
def test_shared_prompts_change_neither_logits_nor_gradients(
    architecture: str, checkpointing: bool
) -> None:
    """Float32 rounding: sums over a prompt's n copies and over one copy add in another order."""
    student, rows = make_student(architecture).train(), make_rollouts()
    whole, shared = collate(rows), collate(rows, groups=GROUPS)
    assert len(whole.token) - len(shared.token) == 6 + 6 + 5
    wanted = student(whole)
    expected = gradients(student.model, wanted)
    if checkpointing:
        student.model.gradient_checkpointing_enable()
    found = student(shared)
    tolerance = 3e-6 * float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert_close(gradients(student.model, found), expected, 1e-5)


@architectures
@torch.no_grad()
def test_completions_of_a_shared_prompt_cannot_see_one_another(architecture: str) -> None:
    student, rows = make_student(architecture), make_rollouts()
    before = student(collate(rows, groups=GROUPS)).split(COMPLETIONS)
    for changed, row in enumerate(rows):
        token = row.arrays["token"]
        completion = np.arange(len(token)) >= PROMPTS[changed]
        other = make_row(changed, (token + completion) % VOCAB, PROMPTS[changed])
        altered = [other if i == changed else r for i, r in enumerate(rows)]
        after = student(collate(altered, groups=GROUPS)).split(COMPLETIONS)
        for i in range(len(rows)):
            assert torch.equal(before[i][:1], after[i][:1]), "the prompt alone predicts it"
            unseen = i != changed or COMPLETIONS[i] == 1
            assert torch.equal(before[i], after[i]) == unseen


@torch.no_grad()
def test_a_model_that_is_not_told_the_boundaries_is_refused() -> None:
    student = make_student("llama")
    with pytest.raises(ShapeError, match="segments"):
        student.model(torch.arange(9)[None], use_cache=False)
