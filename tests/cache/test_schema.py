"""The tables of columns."""

import numpy as np
import pytest
from pcodec import ChunkConfig, standalone

from stillroom.cache.schema import BY_NAME, COLUMNS, column_of, expected_shapes


@pytest.mark.parametrize("dtype", sorted({column.dtype for column in COLUMNS}))
def test_the_codec_takes_every_dtype(dtype: str) -> None:
    numbers = np.arange(100).astype(dtype)
    back = standalone.simple_decompress(standalone.simple_compress(numbers, ChunkConfig()))
    assert isinstance(back, np.ndarray)
    assert back.dtype == numbers.dtype
    assert (back == numbers).all()


def test_names_are_unique_and_edges_belong_to_an_axis() -> None:
    assert len(BY_NAME) == len(COLUMNS)
    assert {c.name for c in COLUMNS if c.axis == "edge"} == {
        "sequence_start",
        "position_start",
        "teacher_prompt_start",
    }


def test_shapes_follow_from_the_axes() -> None:
    sizes = {"position": 7, "token": 9, "sequence": 2, "edge": 3, "teacher_token": 0}
    shapes = expected_shapes(sizes, 4, 0)
    assert shapes["topk_id"] == (7, 4)
    assert shapes["position_start"] == (3,)
    assert shapes["teacher_prompt"] == (0,)
    assert "extra_id" not in shapes
    assert expected_shapes(sizes, 4, 2)["extra_id"] == (7, 2)


def test_a_user_column_is_float32_on_its_axis() -> None:
    assert column_of("x_reward", "position").axis == "position"
    assert column_of("x_reward").dtype == "float32"
    assert column_of("token") is BY_NAME["token"]
