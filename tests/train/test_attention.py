"""Row attention: the formula, each segment by itself, and which kernel runs."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.errors import ShapeError
from stillroom.train import attention
from stillroom.train.attention import row_attention
from stillroom.train.segments import Segments

LENGTHS = [9, 3, 1, 14]
CPU = torch.device("cpu")


def segments_of(
    lengths: list[int], prefix: list[int] | None = None, device: torch.device = CPU
) -> Segments:
    """Segments of these lengths; without prefixes if none are given."""
    edge = np.cumsum([0, *lengths]).astype(np.int32)
    before = np.full(len(lengths), -1) if prefix is None else np.array(prefix)
    return Segments.of(edge, before, device)


def brute_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: np.ndarray | None,
) -> np.ndarray:
    """The last queries (heads, C, D) of a sequence with keys (key heads, T, D): two loops."""
    group, offset = len(query) // len(key), key.shape[1] - query.shape[1]
    out = np.empty_like(query)
    for head, t in np.ndindex(query.shape[:2]):
        at = offset + t
        first = 0 if window is None else max(0, at - window + 1)
        k, v = (x[head // group, first : at + 1] for x in (key, value))
        score = scale * (k @ query[head, t])
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        weight = np.exp(score)
        rest = 0 if sink is None else np.exp(sink[head])
        out[head, t] = weight / (weight.sum() + rest) @ v
    return out


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths of segments, and for each -1 or an earlier one that has no prefix itself."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    prefix: list[int] = []
    for i in range(len(lengths)):
        roots = [j for j in range(i) if prefix[j] < 0]
        prefix.append(draw(st.sampled_from([-1, *roots])))
    return lengths, prefix


@settings(max_examples=100, deadline=None)
@given(
    packing=packings(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 15),
    scaling=st.none() | st.floats(0.01, 2),
    softcap=st.none() | st.floats(0.5, 3),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_row_attention_is_the_formula(
    packing: tuple[list[int], list[int]],
    heads: tuple[int, int],
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    (lengths, prefix), size = packing, 4
    total = sum(lengths)
    query = rng.normal(size=(heads[0], total, size))
    key, value = rng.normal(size=(2, heads[1], total, size))
    sink = rng.normal(size=heads[0]) if sinks else None
    out, weights = row_attention(
        torch.nn.Identity(),
        torch.from_numpy(query)[None],
        torch.from_numpy(key)[None],
        torch.from_numpy(value)[None],
        None,
        segments=segments_of(lengths, prefix),
        scaling=scaling,
        sliding_window=window,
        softcap=softcap,
        s_aux=None if sink is None else torch.from_numpy(sink),
    )
    assert weights is None
    assert out.shape == (1, total, heads[0], size)
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    spans = [slice(a, b) for a, b in pairwise(np.cumsum([0, *lengths]))]
    for span, before in zip(spans, prefix, strict=True):
        seen = [spans[before], span] if before >= 0 else [span]
        keys, values = (np.concatenate([x[:, s] for s in seen], 1) for x in (key, value))
        expected = brute_attention(query[:, span], keys, values, scale, window, softcap, sink)
        np.testing.assert_allclose(out[0, span].transpose(0, 1), expected, rtol=1e-9, atol=1e-12)


def random_heads(total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of 4 heads, 2 key heads and D = 8."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, total, 8, generator=generator)
    return query, key, value


def attend(heads: tuple[torch.Tensor, ...], segments: Segments, **settings: Any) -> torch.Tensor:
    """Row attention of a query, a key and a value."""
    query, key, value = heads
    return row_attention(
        torch.nn.Identity(), query, key, value, None, segments=segments, **settings
    )[0]


def test_the_attention_of_a_row_equals_the_row_alone_to_the_bit() -> None:
    heads = random_heads(sum(LENGTHS))
    packed = attend(heads, segments_of(LENGTHS))
    for start, stop in pairwise(np.cumsum([0, *LENGTHS])):
        row = tuple(x[:, :, start:stop].contiguous() for x in heads)
        assert torch.equal(packed[:, start:stop], attend(row, segments_of([stop - start])))


def test_dropout_drops() -> None:
    heads, segments = random_heads(12), segments_of([4, 8])
    for cap in ({}, {"softcap": 5.0}):
        torch.manual_seed(0)
        kept, dropped = (attend(heads, segments, dropout=p, **cap) for p in (0.0, 1 - 1e-6))
        assert kept.abs().min() > 0
        assert dropped.count_nonzero() == 0


def call(**changes: Any) -> None:
    """Row attention of one row of three tokens, with something changed."""
    tensor = torch.zeros(changes.pop("batch", 1), 2, 3, 4)
    arguments = {"attention_mask": None, "segments": segments_of([3])} | changes
    mask = arguments.pop("attention_mask")
    row_attention(torch.nn.Identity(), tensor, tensor, tensor, mask, **arguments)


@pytest.mark.parametrize(
    "wrong",
    [{"segments": None}, {"attention_mask": torch.ones(1, 1, 3, 3)}, {"batch": 2}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_not_packed_is_refused(wrong: dict[str, Any]) -> None:
    call()
    with pytest.raises(ShapeError, match="Identity: expected one packed batch"):
        call(**wrong)


def flash_twin(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edge_q: torch.Tensor,
    edge_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What the variable-length kernel is documented to do: (T, heads, D), a window to the left."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0, "causal"
    assert longest_q == longest_k == int(edge_q.diff().max())
    out = []
    for start, stop in pairwise(edge_q.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1).numpy() for x in (query, key, value))
        window = None if window_size[0] < 0 else window_size[0] + 1
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out.append(torch.from_numpy(brute_attention(q, k, v, factor, window, None, None)))
    assert torch.equal(edge_q, edge_k)
    return torch.cat(out, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_the_variable_length_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, window: int | None, scaling: float | None
) -> None:
    heads, segments = random_heads(sum(LENGTHS)), segments_of(LENGTHS)
    expected = attend(heads, segments, sliding_window=window, scaling=scaling)
    monkeypatch.setattr(attention, "_has_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", flash_twin)
    found = attend(heads, segments, sliding_window=window, scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 0.1}, {"softcap": 1.0}, {"s_aux": torch.zeros(4)}, {"prefix": [-1, 0, -1, 2]}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_variable_length_kernel_is_not_asked_for_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(attention, "_has_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", refuse)
    heads = random_heads(sum(LENGTHS))
    with pytest.raises(AssertionError, match="called"):
        attend(heads, segments_of(LENGTHS))
    rest = {name: value for name, value in settings.items() if name != "prefix"}
    attend(heads, segments_of(LENGTHS, settings.get("prefix")), **rest)


@pytest.mark.parametrize(
    "settings",
    [
        {"indices": torch.zeros(1, 13, 4)},
        {"block_indices": torch.zeros(1, 13, 4)},
        {"position_bias": torch.zeros(1, 4, 13, 13)},
        {"is_causal": False},
        {"anything": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_would_be_lost_is_refused(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(
        ShapeError, match=f"Identity: expected causal attention, no more; got {name}"
    ):
        attend(random_heads(sum(LENGTHS)), segments_of(LENGTHS), **settings)


def test_what_changes_nothing_is_taken() -> None:
    heads, segments = random_heads(sum(LENGTHS)), segments_of(LENGTHS)
    others = dict.fromkeys(attention.HARMLESS, 3)
    unset = {"indices": None, "position_bias": None, "output_attentions": False, "is_causal": True}
    assert torch.equal(attend(heads, segments, **others, **unset), attend(heads, segments))


class OnGpu:
    """What is asked of a tensor on a GPU."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, size: int = 64) -> None:
        """Heads of `size`."""
        self.dtype, self.shape, self.device = dtype, (1, 2, 3, size), torch.device("cuda")


@pytest.mark.parametrize(
    ("query", "value", "capability", "has"),
    [
        (OnGpu(), OnGpu(), (9, 0), True),
        (OnGpu(torch.float16, 256), OnGpu(torch.float16, 256), (8, 0), True),
        (OnGpu(torch.float32), OnGpu(torch.float32), (9, 0), False),
        (OnGpu(), OnGpu(), (7, 5), False),
        (OnGpu(size=320), OnGpu(size=320), (9, 0), False),
        (OnGpu(size=20), OnGpu(size=20), (9, 0), False),
        (OnGpu(size=192), OnGpu(size=128), (9, 0), False),
        (torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16),) * 2 + ((9, 0), False),
    ],
    ids=["bfloat16", "float16", "float32", "old", "wide", "odd", "two sizes", "cpu"],
)
def test_the_variable_length_kernel_is_for_half_precision_on_gpus(
    monkeypatch: pytest.MonkeyPatch, query: Any, value: Any, capability: tuple[int, int], has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention._has_varlen(query, value) == has


@pytest.mark.parametrize(
    ("query", "mask", "takes"),
    [
        (OnGpu(), None, True),
        (OnGpu(torch.float16), None, True),
        (OnGpu(torch.float32), None, False),
        (OnGpu(), torch.ones(3, 3), False),
        (torch.zeros(1, 2, 3, 64), torch.ones(3, 3), True),
    ],
    ids=["bfloat16", "float16", "float32", "mask", "cpu"],
)
def test_on_gpus_only_flash_attention_takes_grouped_heads(
    query: Any, mask: torch.Tensor | None, takes: bool
) -> None:
    assert attention._takes_groups(query, mask) == takes


def test_autocast_decides_the_dtype_where_it_is_on() -> None:
    query = torch.zeros(1, 1, 1, 8)
    assert attention._run_dtype(query) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._run_dtype(query) == torch.bfloat16
