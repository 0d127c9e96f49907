"""Columns of any type that fits are cast; a value that does not is named with its row."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from stillroom.cache.errors import ShapeError
from stillroom.cache.foreign_columns import KINDS, cast_column, kind_of

NULL_LIST = pa.list_(pa.null())


def cast(name: str, values: Any) -> tuple[list[Any], dict[int, str]]:
    """Cast a column; what it becomes, and the rows that do not fit."""
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    kind = kind_of(name, values)
    assert kind is not None
    array, bad = cast_column(name, values, kind, "here")
    assert array.type == kind.target
    return array.to_pylist(), bad


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("prompt", [[1, 2], None, []], [[1, 2], None, []]),
        ("prompt", [np.array([1, 2]), (3,)], [[1, 2], [3]]),
        ("prompt", pa.array([[1]], pa.large_list(pa.int64())), [[1]]),
        ("prompt", pa.array([[1, 2]], pa.list_(pa.int16(), 2)), [[1, 2]]),
        ("teacher_prompt", pa.nulls(2), [None, None]),
        ("teacher_prompt", pa.array([[], None], NULL_LIST), [[], None]),
        ("scored", [[True, False]], [[1, 0]]),
        ("behaviour_logprob", [[-1, -0.5], [None]], [[-1.0, -0.5], [None]]),
        ("behaviour_logprob", pa.array([[-0.5]], pa.list_(pa.float16())), [[-0.5]]),
        ("finish_reason", pa.array(["stop"]).dictionary_encode(), ["stop"]),
        ("source", pa.array(["import"], pa.string_view()), ["import"]),
        ("group", [2**64 - 1, None], [2**64 - 1, None]),
        ("group", ["a", None], [xxhash.xxh3_64_intdigest(b"a"), None]),
        ("group", ["a", 7], [xxhash.xxh3_64_intdigest(b"a"), 7]),
        ("ends_with_stop", [True, None], [True, None]),
        ("extra_id", [[[1], None, []], None], [[[1], None, []], None]),
        ("x_reward", [1, 0.5, None], [1.0, 0.5, None]),
        ("x_weight", [None, [1, None]], [None, [1.0, None]]),
    ],
)
def test_what_fits_is_cast(name: str, values: Any, expected: list[Any]) -> None:
    assert cast(name, values) == (expected, {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prompt", "hello", "a list of token ids"),
        ("prompt", ["1"], "a list of token ids"),
        ("prompt", [1.0], "a list of token ids"),
        ("prompt", [True], "a list of token ids"),
        ("prompt", [[1]], "a list of token ids"),
        ("prompt", [-1], "a list of token ids"),
        ("prompt", [2**32], "a list of token ids"),
        ("prompt", [2**70], "a list of token ids"),
        ("prompt", 3, "a list of token ids"),
        ("prompt", {"ids": [1]}, "a list of token ids"),
        ("scored", [0.0], "a list of 0 and 1"),
        ("scored", [256], "a list of 0 and 1"),
        ("behaviour_logprob", -1.0, "a list of numbers"),
        ("behaviour_logprob", ["-1"], "a list of numbers"),
        ("finish_reason", 1, "a string"),
        ("group", -1, "an integer from 0, or a string"),
        ("sample_index", 0.5, "an integer"),
        ("ends_with_stop", 1, "true or false"),
        ("extra_id", [1], "a list of token ids for each token"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: Any, words: str) -> None:
    good = {"prompt": [5], "scored": [1], "behaviour_logprob": [-1.0], "extra_id": [[5]]}
    fine = good.get(name, "a" if name == "finish_reason" else name == "ends_with_stop")
    fine = 7 if fine is False else fine
    values, bad = cast(name, [fine, value, fine])
    assert values[1] is None
    assert values[0] == values[2] == fine
    assert bad == {1: f"{name!r} is {value!r}, not {words}"}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("policy_version_min", 2**31, "out of int32"),
        ("policy_version_max", 2**70, "out of int32"),
        ("sample_index", -1, "out of uint32"),
        ("x_a", 2**24 + 1, "not exact as float32"),
        ("x_a", 2**70 + 1, "not exact as float32"),
        ("x_a", [2**24 + 1], "not exact as float32"),
        ("behaviour_logprob", [-(2**24) - 1], "not exact as float32"),
    ],
)
def test_a_value_of_the_right_type_that_is_too_large_is_named(
    name: str, value: Any, reason: str
) -> None:
    assert cast(name, [None, value]) == ([None, None], {1: f"{name!r} is {value!r}, {reason}"})
    if abs(value if isinstance(value, int) else value[0]) < 2**63:
        assert cast(name, pa.array([None, value]))[1] == {1: f"{name!r} is {value!r}, {reason}"}


def test_long_values_are_cut_in_messages() -> None:
    _, bad = cast("prompt", [["x" * 500]])
    assert len(bad[0]) < 120


def test_a_user_column_is_a_number_or_a_list_throughout() -> None:
    assert cast("x_a", [1.0, [1.0], "b"]) == (
        [1.0, None, None],
        {1: "'x_a' is [1.0], not a number", 2: "'x_a' is 'b', not a number"},
    )
    assert kind_of("x_a", [None, None]) is None
    assert kind_of("x_a", pa.chunked_array([pa.nulls(2)])) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", pa.array([["a"]])),
        ("completion", pa.array([1])),
        ("behaviour_logprob", pa.array([1.0])),
        ("x_reward", pa.array(["a"])),
        ("group", pa.array([1.5])),
        ("scored", pa.array([[0.5]])),
    ],
)
def test_an_arrow_column_of_another_type_is_refused_whole(name: str, values: pa.Array) -> None:
    with pytest.raises(ShapeError, match=f"^here, column '{name}': expected .*; got "):
        cast(name, values)


def test_an_arrow_value_out_of_range_is_named() -> None:
    assert cast("prompt", pa.array([[1], [-1], [2**40]])) == (
        [[1], None, None],
        {
            1: "'prompt' is [-1], not a list of token ids",
            2: "'prompt' is [1099511627776], not a list of token ids",
        },
    )


def test_every_column_of_a_part_has_its_kind() -> None:
    assert all(kind.fits(kind.target) and kind.fits(pa.null()) for kind in KINDS.values())
