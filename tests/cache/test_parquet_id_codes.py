"""Codes of token ids: every id comes back, and bytes of codes cost about what the ids are worth."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.parquet_id_codes import MAX_CODES, MAX_ID, code_ids
from stillroom.cache.schema import UNUSED_ID
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits


@QUICK
@given(
    st.lists(
        st.one_of(st.integers(0, 9), st.integers(0, MAX_ID - 1), st.just(UNUSED_ID)), min_size=1
    )
)
def test_every_id_comes_back(ids: list[int]) -> None:
    array = np.array(ids, np.uint32)
    codes = code_ids(array)
    assert codes is not None
    assert codes.code.dtype == np.uint16
    assert same_bits(codes.id_list[codes.code], array)


@pytest.mark.parametrize("number", [1, 2, 255, 256, 257, 33_000, MAX_CODES])
def test_any_number_of_ids_has_codes(number: int) -> None:
    ids = np.arange(number, dtype=np.uint32)[::-1].reshape(-1, 1)
    codes = code_ids(ids)
    assert codes is not None
    assert len(codes.id_list) <= MAX_CODES
    assert same_bits(codes.id_list[codes.code], ids)


def test_what_has_no_codes() -> None:
    assert code_ids(np.arange(MAX_CODES + 1, dtype=np.uint32)) is None
    assert code_ids(np.array([MAX_ID], np.uint32)) is None
    assert code_ids(np.empty((0, 5), np.uint32)) is None


def test_bytes_of_codes_cost_what_the_ids_are_worth() -> None:
    """Ids that are likely by 1 / rank, whatever their numbers."""
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(20_000) + 8)
    share /= share.sum()
    ids = rng.permutation(50_000)[rng.choice(len(share), 200_000, p=share)].astype(np.uint32)
    entropy_bytes = -(share * np.log2(share)).sum() * len(ids) / 8
    codes = code_ids(ids)
    assert codes is not None
    zstd = pa.Codec("zstd", compression_level=1)
    assert zstd.compress(codes.code.tobytes()).size < 1.04 * entropy_bytes
    assert zstd.compress(ids.tobytes()).size > 1.25 * entropy_bytes
