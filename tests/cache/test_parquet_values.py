"""Values of pages: to the bit and back, and refused where they are not what a field holds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache.parquet_layout import (
    BYTE_STREAM_SPLIT,
    PLAIN,
    RLE_DICTIONARY,
    Field,
    fields_of,
    plain_encoding,
)
from stillroom.cache.parquet_values import (
    decode_values,
    encode_values,
    encoded_bytes,
    float_to_half,
    half_to_float,
    names_dictionary,
)
from tests.cache.conftest import QUICK
from tests.cache.fakes import same_bits

FIELDS = {field.name: field for field in fields_of({"x_reward": "sequence"}, extra=True)}
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
"""All of them."""
ALL = slice(None)


def random_values(field: Field, count: int, seed: int) -> np.ndarray:
    """Any bits; 0 and 1 where they are flags."""
    rng = np.random.default_rng(seed)
    if field.stored == "bool":
        return rng.integers(0, 2, count, field.dtype)
    size = np.dtype(field.dtype).itemsize
    return np.frombuffer(rng.bytes(count * size), field.dtype)


@QUICK
@given(
    st.sampled_from([name for name, field in FIELDS.items() if not field.names]),
    st.integers(0, 100),
    st.integers(0, 2**32),
)
def test_values_come_back_to_the_bit(name: str, count: int, seed: int) -> None:
    field = FIELDS[name]
    values, encoding = random_values(field, count, seed), plain_encoding(field)
    data = encode_values(field, values, encoding)
    assert len(data) == encoded_bytes(field, count, encoding)
    assert same_bits(decode_values(field, b"levels" + data, 6, count, encoding, ALL), values)
    part = slice(count // 3, count // 2)
    some = decode_values(field, b"levels" + data, 6, count, encoding, part)
    assert same_bits(some, values[part])


@QUICK
@given(st.sampled_from(["source", "topk_id"]), st.integers(0, 100), st.integers(0, 2**32))
def test_codes_come_back(name: str, count: int, seed: int) -> None:
    dtype = np.uint16 if FIELDS[name].is_id else np.uint8
    codes = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, count, dtype)
    data = encode_values(FIELDS[name], codes, RLE_DICTIONARY)
    assert len(data) == encoded_bytes(FIELDS[name], count, RLE_DICTIONARY)
    assert same_bits(decode_values(FIELDS[name], data, 0, count, RLE_DICTIONARY, ALL), codes)


def test_every_half_float_comes_back_to_the_bit() -> None:
    field = FIELDS["topk_logprob"]
    data = encode_values(field, HALVES, BYTE_STREAM_SPLIT)
    assert same_bits(decode_values(field, data, 0, len(HALVES), BYTE_STREAM_SPLIT, ALL), HALVES)
    wide = half_to_float(HALVES)
    assert same_bits(float_to_half(wide), HALVES)
    finite = np.isfinite(HALVES)
    assert wide[finite].tolist() == [float(half) for half in HALVES[finite]]
    assert np.array_equal(np.isnan(wide), np.isnan(HALVES))


def test_bytes_are_split_as_parquet_says() -> None:
    values = np.array([0x04030201, 0x14131211], np.uint32)
    data = encode_values(FIELDS["topk_id"], values, BYTE_STREAM_SPLIT)
    assert data == bytes.fromhex("01 11 02 12 03 13 04 14")


def test_flags_and_numbers_are_packed_as_parquet_says() -> None:
    flags = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], np.uint16)
    assert encode_values(FIELDS["scored"], flags, PLAIN) == bytes([0b1101, 1])
    assert encode_values(FIELDS["sample_index"], np.array([258], np.uint32), PLAIN) == b"\2\1\0\0"


def test_codes_are_one_run_of_plain_bytes() -> None:
    data = encode_values(FIELDS["topk_id"], np.array([1, 515], np.uint16), RLE_DICTIONARY)
    assert data == bytes([16, 3]) + bytes([1, 0, 3, 2]) + bytes(12)


def test_names_are_strings_of_parquet() -> None:
    assert names_dictionary(("a", "stop")) == b"\1\0\0\0a\4\0\0\0stop"


@pytest.mark.parametrize("value", [0.1, -1 - 2**-20, 1 + 2**-11])
def test_floats_that_are_no_half_floats_are_refused(value: float) -> None:
    field = FIELDS["tail_logprob"]
    data = encode_values(
        FIELDS["sampled_logprob"], np.array([value], np.float32), BYTE_STREAM_SPLIT
    )
    with pytest.raises(ValueError, match="half floats"):
        decode_values(field, data, 0, 1, BYTE_STREAM_SPLIT, ALL)


def test_codes_of_another_width_are_refused() -> None:
    data = encode_values(FIELDS["source"], np.array([1], np.uint8), RLE_DICTIONARY)
    with pytest.raises(ValueError, match="one run"):
        decode_values(FIELDS["topk_id"], data + bytes(99), 0, 1, RLE_DICTIONARY, ALL)
