"""One chunk's bytes: exactly the numbers that went in, or an error."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pcodec import ChunkConfig, standalone

from stillroom.cache.codec import decode_chunk
from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import COLUMNS
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits

DTYPES = sorted({column.dtype for column in COLUMNS})


def encode(numbers: np.ndarray) -> bytes:
    """Bytes of a chunk, as zarr's PCodec makes them."""
    return bytes(standalone.simple_compress(numbers, ChunkConfig()))


@QUICK
@given(st.data())
def test_any_bits_come_back(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    raw = data.draw(hnp.arrays(f"u{dtype.itemsize}", st.integers(1, 300)))
    numbers = raw.view(dtype)
    assert same_bits(decode_chunk(encode(numbers), dtype, len(numbers), "here"), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 99, 101, 100_000])
def test_another_count_is_refused(dtype: str, count: int) -> None:
    data = encode(np.arange(100).astype(dtype))
    with pytest.raises(CorruptError, match=rf"^here: expected {count} encoded numbers"):
        decode_chunk(data, np.dtype(dtype), count, "here")


@pytest.mark.parametrize("dtype", ["float16", "uint32"])
def test_another_dtype_is_refused(dtype: str) -> None:
    data = encode(np.arange(100, dtype=np.float32))
    with pytest.raises(CorruptError):
        decode_chunk(data, np.dtype(dtype), 100, "here")


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with suppress(CorruptError):
        assert decode_chunk(data, np.dtype("float32"), 10, "here").shape == (10,)


def test_half_a_chunk_is_refused() -> None:
    data = encode(np.random.default_rng(0).random(1000))
    for length in range(0, len(data) - 1, 97):
        with pytest.raises(CorruptError):
            decode_chunk(data[:length], np.dtype("float64"), 1000, "here")
