"""The format's order of entries, against a sort by two keys."""

import numpy as np
import pytest

from stillroom.cache.rounded import rounded
from stillroom.cache.schema import UNUSED_ID
from tests.cache.fakes import same_bits


def columns_of(topk_id: np.ndarray, topk_logprob: np.ndarray) -> dict[str, np.ndarray]:
    """Columns with these entries and zeros elsewhere."""
    zero = np.zeros(len(topk_id), np.float32)
    named = {"topk_id": topk_id, "topk_logprob": topk_logprob, "topk_count": zero.astype(np.int64)}
    return {**named, "tail_logprob": zero, "sampled_logprob": zero}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entries_are_sorted_by_rounded_logprob_and_then_by_id(dtype: type) -> None:
    rng = np.random.default_rng(0)
    logprob: np.ndarray = -rng.exponential(4, (500, 33)).astype(dtype)
    logprob[::7, :20] = logprob[::7, :1]
    logprob[::11, 5:9] = 0.0
    logprob[::11, 7] = -0.0
    logprob[::5, 30:] = -np.inf
    topk_id = rng.permuted(np.tile(np.arange(40), (500, 1)), axis=1)[:, :33]
    topk_id[:, 0] = 2**32 - 2
    topk_id[::5, 32] = UNUSED_ID
    found = rounded(columns_of(topk_id, logprob))
    half = np.minimum(logprob, 0).astype(np.float16)
    order = np.lexsort((topk_id, -half.astype(np.float32)), axis=-1)
    assert same_bits(found.topk_id, np.take_along_axis(topk_id, order, 1).astype(np.uint32))
    assert same_bits(found.topk_logprob, np.take_along_axis(half, order, 1))


def test_no_probability_is_above_one_or_below_the_range() -> None:
    found = rounded(columns_of(np.array([[3, 2, 1]]), np.array([[-7e4, 1e-5, -6.55e4]])))
    assert found.topk_id.tolist() == [[2, 1, 3]]
    assert found.topk_logprob.tolist() == [[0.0, -65504.0, -np.inf]]


def test_no_positions_are_no_trouble() -> None:
    found = rounded(columns_of(np.zeros((0, 4), np.int64), np.zeros((0, 4))))
    assert found.topk_id.shape == found.topk_logprob.shape == (0, 4)
    assert found.topk_id.dtype == np.uint32
