"""The student: logits at scored positions, and packing only where it changes nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from stillroom.cache.errors import InputError, ShapeError
from stillroom.cache.fingerprint import inspect_model
from stillroom.replay.batch import MicroBatch, Row, collate, idle_micro_batch
from stillroom.train.attention import NAME, row_attention
from stillroom.train.config import ReplayConfig
from stillroom.train.segments import Segments
from stillroom.train.student import Student, load_student, load_trainable, to_target
from tests.conftest import VOCAB, save_llama, save_tokenizer

CPU = torch.device("cpu")
TOPK = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def make_row(rng: np.random.Generator, number: int, scored: list[int]) -> Row:
    """A row of two prompt tokens and a completion, with made-up scores."""
    count = sum(scored)
    arrays: dict[str, np.ndarray] = {
        "token": rng.integers(0, VOCAB, 2 + len(scored)).astype(np.uint32),
        "scored": np.array([0, 0, *scored], np.uint16),
        "prompt_length": np.array([2], np.uint32),
        "topk_id": rng.integers(0, VOCAB, (count, TOPK)).astype(np.uint32),
        "topk_logprob": -rng.random((count, TOPK)).astype(np.float16),
        "tail_logprob": -rng.random(count).astype(np.float16),
        "sampled_logprob": -rng.random(count).astype(np.float32),
        "behaviour_logprob": np.full(count, np.nan, np.float32),
        "policy_version_min": np.array([0], np.int32),
        "source": np.array([1], np.uint16),
    }
    return Row(number, arrays, 1.0)


@pytest.fixture
def rows() -> list[Row]:
    """Three rows; the second has gaps, the third a single scored token."""
    rng = np.random.default_rng(0)
    masks = [[1, 1, 1, 1], [0, 1, 0, 0, 1, 1], [1]]
    return [make_row(rng, number, mask) for number, mask in enumerate(masks)]


@pytest.fixture
def batch(rows: list[Row]) -> MicroBatch:
    """They, packed."""
    return collate(rows)


def open_student(folder: Path, dtype: str = "float32") -> Student:
    """Load a student on the CPU."""
    return load_student(inspect_model(str(folder)), dtype, CPU)


def full_logits(folder: Path, rows: list[Row], attention: str | None = None) -> torch.Tensor:
    """(P, V): of each row by itself, by plain transformers, one token before each scored one."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    picked = []
    for row in rows:
        token = torch.from_numpy(row.arrays["token"].astype(np.int64))
        logits = model(token[None]).logits[0]
        picked += [logits[t - 1] for t in np.flatnonzero(row.arrays["scored"])]
    return torch.stack(picked).detach()


@torch.no_grad()
def test_logits_are_those_that_predict_the_scored_tokens(
    student_dir: Path, rows: list[Row], batch: MicroBatch
) -> None:
    logits = open_student(student_dir)(batch)
    assert logits.shape == (8, VOCAB)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, full_logits(student_dir, rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_padded_head_gives_its_whole_width(
    tmp_path: Path, rows: list[Row], batch: MicroBatch
) -> None:
    folder = save_llama(tmp_path / "padded", seed=3, width=VOCAB + 10)
    logits = open_student(folder)(batch)
    assert logits.shape == (8, VOCAB + 10)
    torch.testing.assert_close(logits, full_logits(folder, rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_how_rows_are_packed_changes_nothing(student_dir: Path, rows: list[Row]) -> None:
    student = open_student(student_dir)
    together = student(collate(rows)).split([4, 3, 1])
    backwards = student(collate(rows[::-1])).split([1, 3, 4])[::-1]
    for row, one, other in zip(rows, together, backwards, strict=True):
        torch.testing.assert_close(one, student(collate([row])), rtol=0, atol=1e-5)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_only_scored_positions_have_a_gradient(student_dir: Path, rows: list[Row]) -> None:
    """Tokens after the last scored one are read, and matter to nothing."""
    rows[1].arrays["scored"][6:] = 0
    rows[1].arrays.update({n: a[:1] for n, a in rows[1].arrays.items() if n.endswith("logprob")})
    rows[1].arrays["topk_id"] = rows[1].arrays["topk_id"][:1]
    student = open_student(student_dir).train()

    def gradient(last: int) -> torch.Tensor:
        rows[1].arrays["token"][-1] = last
        student.zero_grad()
        student(collate(rows)).square().sum().backward()
        weight = student.model.get_submodule("model.layers.1.mlp.down_proj").weight
        assert isinstance(weight, torch.Tensor)
        assert weight.grad is not None
        return weight.grad.clone()

    assert torch.equal(gradient(3), gradient(4))


@torch.no_grad()
def test_an_idle_micro_batch_passes_through(student_dir: Path) -> None:
    assert open_student(student_dir)(idle_micro_batch()).shape == (1, VOCAB)


def test_parameters_keep_their_names_and_need_gradients(student_dir: Path) -> None:
    student = open_student(student_dir)
    plain = AutoModelForCausalLM.from_pretrained(student_dir)
    assert [n for n, _ in student.named_parameters()] == [
        f"model.{name}" for name, _ in plain.named_parameters()
    ]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not student.model.training, "loaded for evaluation"


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_pass_the_checks(
    student_dir: Path, rows: list[Row], batch: MicroBatch, dtype: str
) -> None:
    logits = open_student(student_dir, dtype)(batch)
    assert logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits.float(), full_logits(student_dir, rows), rtol=0, atol=0.3)


def ignoring_boundaries(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What comes of a kernel that does not know the keyword."""
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def with_another_scale(*args: Any, scaling: float, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Keeps rows apart, and computes something else."""
    return row_attention(*args, scaling=3 * scaling, **kwargs)


def without_prefixes(*args: Any, segments: Segments, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Leaves shared prompts out."""
    spans = tuple(span._replace(prefix_stop=span.prefix_start) for span in segments.spans)
    return row_attention(*args, segments=Segments(spans, segments.edge), **kwargs)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (ignoring_boundaries, "packed rows of LlamaForCausalLM see one another"),
        (with_another_scale, r"packed rows of LlamaForCausalLM differ by \d\.\d+ from"),
    ],
)
@torch.no_grad()
def test_a_model_that_packing_would_change_takes_one_row_at_a_time(
    student_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: Callable[..., Any],
    why: str,
    rows: list[Row],
    batch: MicroBatch,
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attention)
    student = open_student(student_dir)
    assert not student.packs
    assert not student.shares
    assert re.match(why, student.why_one_row)
    logits = torch.cat([student(collate([row])) for row in rows])
    torch.testing.assert_close(logits, full_logits(student_dir, rows), rtol=0, atol=1e-5)
    with pytest.raises(ShapeError, match=f"one row; got 3 segments. Open a one_row .*{why}"):
        student(batch)


@torch.no_grad()
def test_a_model_that_cannot_share_prompts_still_packs(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row], batch: MicroBatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, without_prefixes)
    student = open_student(student_dir)
    assert student.packs
    assert not student.shares
    assert student.why_unshared.startswith("rows with a shared prompt of LlamaForCausalLM differ")
    torch.testing.assert_close(student(batch), full_logits(student_dir, rows), rtol=0, atol=1e-5)
    with pytest.raises(ShapeError, match="expected whole rows; got a shared prompt"):
        student(replace(batch, prefix=np.array([-1, 0, -1], np.int32)))


@torch.no_grad()
def test_rows_with_a_shared_prompt_give_the_logits_of_whole_rows(
    student_dir: Path, rows: list[Row]
) -> None:
    for row in rows[1:]:
        row.arrays["token"][:2] = rows[0].arrays["token"][:2]
    student = open_student(student_dir)
    assert student.shares
    batch = collate(rows, groups=[0, 0, 1])
    assert len(batch.token) == sum(len(row.arrays["token"]) for row in rows) - 2
    torch.testing.assert_close(student(batch), full_logits(student_dir, rows), rtol=0, atol=1e-5)


def save_model(folder: Path, config: PreTrainedConfig) -> Path:
    """A random model of some architecture, with the usual tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


LINEAR: dict[str, Any] = {f"linear_{part}": 2 for part in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, eos_token_id=1, state_size=4
        ),
        Qwen3_5TextConfig(**SIZES, **LINEAR, layer_types=["linear_attention", "full_attention"]),
    ],
    ids=["Mamba", "Qwen3_5"],
)
@torch.no_grad()
def test_an_architecture_with_a_state_takes_one_row_at_a_time(
    tmp_path: Path, config: PreTrainedConfig, rows: list[Row], batch: MicroBatch
) -> None:
    folder = save_model(tmp_path / "model", config)
    student = open_student(folder)
    assert re.fullmatch(r"packed rows of \w+ForCausalLM see one another", student.why_one_row)
    logits = torch.cat([student(collate([row])) for row in rows])
    torch.testing.assert_close(logits, full_logits(folder, rows), rtol=0, atol=1e-4)
    assert student(idle_micro_batch()).shape == (1, VOCAB)
    with pytest.raises(ShapeError, match="Open a one_row stream"):
        student(batch)


@pytest.mark.parametrize(
    "config",
    [
        GptOssConfig(**SIZES, num_local_experts=4, rope_parameters={"rope_type": "default"}),
        Gemma2Config(**SIZES, attn_logit_softcapping=1.0),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ],
    ids=["attention sinks", "soft-capped scores", "experts"],
)
@torch.no_grad()
def test_an_architecture_of_attention_alone_packs(
    tmp_path: Path, config: PreTrainedConfig, rows: list[Row], batch: MicroBatch
) -> None:
    folder = save_model(tmp_path / "model", config)
    student = open_student(folder)
    assert student.packs
    assert student.shares
    attention = "sdpa" if isinstance(config, Qwen3MoeConfig) else "eager"
    expected = full_logits(folder, rows, attention)
    torch.testing.assert_close(student(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_missing_weights_are_refused(tmp_path: Path, lost: str) -> None:
    folder = save_llama(tmp_path / "lacking", seed=2)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 missing or of another shape, such as {lost}"):
        open_student(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "misshapen", seed=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="misshapen: expected "):
        open_student(folder)


def test_a_target_holds_the_teachers_values(batch: MicroBatch) -> None:
    target = to_target(batch, CPU)
    for name in ("topk_id", "sampled_id"):
        assert getattr(target, name).dtype == torch.int64
        assert np.array_equal(getattr(target, name).numpy(), getattr(batch, name))
    for name in ("topk_logprob", "tail_logprob", "sampled_logprob", "behaviour_logprob"):
        assert getattr(target, name).dtype == torch.float32
        np.testing.assert_array_equal(getattr(target, name).numpy(), getattr(batch, name))
    assert target.topk_id.shape == target.topk_logprob.shape == (8, TOPK)
    assert target.mask.dtype == torch.bool
    assert target.mask.tolist() == [True] * 8


def test_a_student_that_will_be_shared_out_stays_in_main_memory(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.train.student.world", lambda: 2)
    files, config = inspect_model(str(student_dir)), ReplayConfig(parallel="fsdp")
    assert load_trainable(files, config, torch.device("cuda")).model.device == CPU
