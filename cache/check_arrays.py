"""Whether arrays are a whole shard: every column, of its dtype and shape, with offsets that fit and
no entry beyond its position's count."""

from typing import Final

import numpy as np

from stillroom.cache.errors import ShapeError
from stillroom.cache.schema import (
    BY_NAME,
    COLUMNS,
    EDGE_OF,
    UNUSED_ID,
    USER_NAME,
    USER_PREFIX,
    Arrays,
    expected_shapes,
)

CHECKED_ROWS: Final = 65_536
"""Positions whose entries are compared at once."""


def check_arrays(arrays: Arrays, topk: int, extra: int) -> None:
    """Refuse arrays that are not a whole shard: a column missing, or of another dtype or shape,
    offsets that do not fit, or entries that are used beyond their count.

    Raises:
        ShapeError: names the first wrong column.
    """
    for column in COLUMNS:
        if column.name not in arrays and (extra or column.width != "M"):
            raise _wrong(column.name, f"{column.dtype} per {column.axis}", "nothing")
    measured = {
        "position": "sampled_logprob",
        "token": "token",
        "sequence": "prompt_length",
        "teacher_token": "teacher_prompt",
    }
    sizes = {axis: len(np.atleast_1d(arrays[name])) for axis, name in measured.items()}
    sizes["edge"] = sizes["sequence"] + 1
    shapes = expected_shapes(sizes, topk, extra)
    for name, shape in shapes.items():
        dtype, got = BY_NAME[name].dtype, arrays[name]
        if got.shape != shape or got.dtype != np.dtype(dtype):
            raise _wrong(name, f"{dtype}{list(shape)}", f"{got.dtype}{list(got.shape)}")
    for axis, name in EDGE_OF.items():
        edges, end = arrays[name].astype(np.int64), sizes[axis]
        if edges[0] != 0 or edges[-1] != end or (np.diff(edges) < 0).any():
            raise _wrong(name, f"offsets from 0 up to {end}", "others")
    if arrays["scored"].sum() != sizes["position"]:
        raise _wrong("scored", f"{sizes['position']} ones", "another sum")
    check_entries(arrays, topk, extra)
    for name in arrays.keys() - shapes.keys():
        known_shape = arrays[name].shape in ((sizes["sequence"],), (sizes["position"],))
        if not (USER_NAME.fullmatch(name) and arrays[name].dtype == np.float32 and known_shape):
            raise ShapeError(
                f"column {name!r}",
                f"a declared column, or {USER_PREFIX}NAME as float32 per sequence or position",
                f"{arrays[name].dtype}{list(arrays[name].shape)}",
                f"Name it {USER_PREFIX} and letters, digits or _, or leave it out.",
            )


def check_entries(arrays: Arrays, topk: int, extra: int) -> None:
    """Refuse positions whose entries do not fit their count: up to it each has an id, from there
    on none; what has no id has no score.

    Raises:
        ShapeError: names the first wrong column.
    """
    count = arrays["topk_count"]
    if len(count) and not 1 <= count.min() <= count.max() <= topk:
        raise _wrong("topk_count", f"1 to {topk}", f"{count.min()} to {count.max()}")
    for start in range(0, len(count), CHECKED_ROWS):
        rows = slice(start, start + CHECKED_ROWS)
        unused = np.arange(topk) >= count[rows, None]
        if ((arrays["topk_id"][rows] == UNUSED_ID) != unused).any():
            raise _wrong("topk_id", f"{UNUSED_ID} from topk_count on, and only there", "others")
        _check_unscored(arrays, "topk_logprob", rows, unused)
        if extra:
            unused = arrays["extra_id"][rows] == UNUSED_ID
            _check_unscored(arrays, "extra_logprob", rows, unused)
            if not np.isnan(arrays["extra_behaviour_logprob"][rows][unused]).all():
                raise _wrong("extra_behaviour_logprob", "NaN where there is no id", "others")


def _check_unscored(arrays: Arrays, name: str, rows: slice, unused: np.ndarray) -> None:
    if not np.isneginf(arrays[name][rows][unused]).all():
        raise _wrong(name, "-inf where there is no id", "others")


def _wrong(name: str, expected: str, got: str) -> ShapeError:
    return ShapeError(f"column {name!r}", expected, got, "Build the shard with cache.score.")
