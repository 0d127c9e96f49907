"""One chunk's bytes: exactly the numbers that went in, or an error."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stillroom.cache.codec import AUTO, CODES, DIFFERENCES, UNORDERED, decode_chunk, encode_chunk
from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import COLUMNS
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits

DTYPES = sorted({column.dtype for column in COLUMNS})
SETTINGS = {"auto": AUTO, "codes": CODES, "unordered": UNORDERED, "differences": DIFFERENCES}


def decode(data: bytes, dtype: str | np.dtype, *shape: int) -> np.ndarray:
    """Numbers of a chunk that should have this shape."""
    out = np.empty(shape, dtype)
    decode_chunk(data, out, "here")
    return out


@QUICK
@given(st.data(), st.sampled_from(list(SETTINGS.values())))
def test_any_bits_come_back(data: st.DataObject, settings: dict[str, Any]) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
    raw = data.draw(hnp.arrays(f"u{dtype.itemsize}", st.integers(0, 300)))
    numbers = raw.view(dtype)
    assert same_bits(decode(encode_chunk(numbers, settings), dtype, len(numbers)), numbers)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_rows_are_laid_end_to_end(settings: dict[str, Any]) -> None:
    numbers = np.random.default_rng(0).integers(0, 9, (50, 7), np.uint32)
    data = encode_chunk(numbers, settings)
    assert data == encode_chunk(np.asfortranarray(numbers), settings)
    assert data == encode_chunk(numbers.reshape(-1), settings)
    assert same_bits(decode(data, "uint32", 50, 7), numbers)


def test_numbers_are_decoded_into_a_part_of_an_array() -> None:
    whole = np.full((9, 4), 77, np.uint32)
    decode_chunk(encode_chunk(np.arange(12, dtype=np.uint32), AUTO), whole[3:6], "here")
    assert whole[3:6].ravel().tolist() == list(range(12))
    assert (np.delete(whole, np.s_[3:6], axis=0) == 77).all()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("count", [1, 255, 256, 257, 4000, 9999])
def test_the_first_numbers_alone_are_decoded(settings: dict[str, Any], count: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 99, 10_000, np.uint32)
    data = encode_chunk(numbers, settings)
    out = np.full(count + 9, 77, np.uint32)
    decode_chunk(data, out[:count], "here", 10_000)
    assert same_bits(out[:count], numbers[:count])
    assert (out[count:] == 77).all()
    with pytest.raises(CorruptError, match=f"expected {count} encoded numbers"):
        decode_chunk(encode_chunk(numbers[:count], settings), out[:count], "here", 10_000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 99, 101, 100_000])
def test_another_count_is_refused(dtype: str, count: int) -> None:
    data = encode_chunk(np.arange(100).astype(dtype), AUTO)
    with pytest.raises(CorruptError, match=rf"^here: expected {count} encoded numbers"):
        decode(data, dtype, count)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_another_dtype_is_refused(stored: str, wanted: str) -> None:
    data = encode_chunk(np.arange(100).astype(stored), AUTO)
    if stored == wanted:
        assert decode(data, wanted, 100).tolist() == list(range(100))
        return
    with pytest.raises(CorruptError, match=r"^here: "):
        decode(data, wanted, 100)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with suppress(CorruptError):
        decode(data, "float32", 10)


def test_half_a_chunk_is_refused() -> None:
    data = encode_chunk(np.random.default_rng(0).random(1000, np.float32), AUTO)
    for length in range(0, len(data) - 1, 97):
        with pytest.raises(CorruptError):
            decode(data[:length], "float32", 1000)
