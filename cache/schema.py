"""What a shard and a rollout part hold: every column once, with its dtype, axis and unit.

Axes: *position* (one scored token, P in all), *token* (prompt and completion tokens of all
sequences end to end, N), *sequence* (one rollout, S), *edge* (S + 1 offsets), *teacher_token*
(tokens of the prompts that only the teacher saw). Row t of the position axis scores a token of the
completion given every token before it.

Other modules render their layouts from these tables; none of them names a dtype again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from stillroom.cache.errors import ShapeError

FORMAT_VERSION: Final = 1
UNUSED_ID: Final = 2**32 - 1
USER_PREFIX: Final = "x_"
CHECKED_ROWS: Final = 65_536
"""Positions whose entries are compared at once."""
USER_NAME: Final = re.compile(r"x_[A-Za-z0-9_]+")

Axis = Literal["position", "token", "sequence", "edge", "teacher_token"]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Column:
    """One array of a shard."""

    name: str
    axis: Axis
    dtype: str
    width: Literal["", "K", "M"]
    """Second dimension: none, K teacher entries, or M extra ids."""
    unit: str
    doc: str


COLUMNS: Final = (
    Column(
        "topk_id",
        "position",
        "uint32",
        "K",
        "token id",
        "the teacher's K likeliest tokens, likeliest first",
    ),
    Column(
        "topk_logprob",
        "position",
        "float16",
        "K",
        "nats",
        "their log probabilities over the full vocabulary",
    ),
    Column("topk_count", "position", "uint16", "", "entries", "how many of the K entries are used"),
    Column(
        "tail_logprob",
        "position",
        "float16",
        "",
        "nats",
        "log of all probability outside the used entries",
    ),
    Column(
        "sampled_logprob",
        "position",
        "float32",
        "",
        "nats",
        "the teacher's logprob of the token at hand",
    ),
    Column(
        "behaviour_logprob",
        "position",
        "float32",
        "",
        "nats",
        "the sampling policy's logprob; NaN if unknown",
    ),
    Column(
        "extra_id",
        "position",
        "uint32",
        "M",
        "token id",
        "ids that the student chose, or draws from the teacher's tail",
    ),
    Column(
        "extra_logprob", "position", "float16", "M", "nats", "the teacher's logprobs of extra_id"
    ),
    Column(
        "extra_behaviour_logprob",
        "position",
        "float32",
        "M",
        "nats",
        "their logprobs where they were chosen; NaN if unknown",
    ),
    Column(
        "token",
        "token",
        "uint32",
        "",
        "token id",
        "prompt, then completion, of each sequence in turn",
    ),
    Column("scored", "token", "uint16", "", "0 or 1", "1 where the token has a position"),
    Column(
        "sequence_start", "edge", "uint64", "", "tokens", "first token of each sequence; last: N"
    ),
    Column(
        "position_start",
        "edge",
        "uint64",
        "",
        "positions",
        "first position of each sequence; last: P",
    ),
    Column(
        "teacher_prompt",
        "teacher_token",
        "uint32",
        "",
        "token id",
        "prompts that only the teacher saw",
    ),
    Column(
        "teacher_prompt_start",
        "edge",
        "uint64",
        "",
        "tokens",
        "their starts; an empty one: same prompt",
    ),
    Column("prompt_length", "sequence", "uint32", "", "tokens", "prompt tokens of the sequence"),
    Column(
        "prompt_id",
        "sequence",
        "uint64",
        "",
        "hash",
        "xxh3-64 of the prompt's ids (little-endian uint32)",
    ),
    Column(
        "group", "sequence", "uint64", "", "id", "equal for the samples drawn of one prompt at once"
    ),
    Column("sample_index", "sequence", "uint32", "", "index", "which sample of its group"),
    Column("rollout_id", "sequence", "uint64", "", "hash", "unique in the cache"),
    Column("finish_reason", "sequence", "uint16", "", "code", "index into FINISH_REASONS"),
    Column("source", "sequence", "uint16", "", "code", "index into SOURCES"),
    Column(
        "policy_version_min",
        "sequence",
        "int32",
        "",
        "version",
        "oldest policy that sampled it; -1 if unknown",
    ),
    Column(
        "policy_version_max",
        "sequence",
        "int32",
        "",
        "version",
        "newest policy that sampled it; -1 if unknown",
    ),
    Column(
        "ends_with_stop",
        "sequence",
        "uint16",
        "",
        "0 or 1",
        "1 where the last token is a stop token",
    ),
)
BY_NAME: Final = {column.name: column for column in COLUMNS}
EDGE_OF: Final[dict[Axis, str]] = {
    "position": "position_start",
    "token": "sequence_start",
    "teacher_token": "teacher_prompt_start",
}
"""Where each axis is cut into sequences."""
FINISH_REASONS: Final = ("unknown", "stop", "length", "abort")
SOURCES: Final = ("unknown", "student", "teacher", "dataset", "import")

PART_SCHEMA: Final = pa.schema(
    [
        pa.field("rollout_id", pa.uint64(), nullable=False),
        pa.field("prompt_id", pa.uint64(), nullable=False),
        pa.field("prompt_name", pa.string()),
        pa.field("group", pa.uint64(), nullable=False),
        pa.field("sample_index", pa.uint32(), nullable=False),
        pa.field("prompt", pa.list_(pa.uint32()), nullable=False),
        pa.field("completion", pa.list_(pa.uint32()), nullable=False),
        pa.field("scored", pa.list_(pa.uint8())),
        pa.field("behaviour_logprob", pa.list_(pa.float32())),
        pa.field("teacher_prompt", pa.list_(pa.uint32())),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("policy_version_min", pa.int32(), nullable=False),
        pa.field("policy_version_max", pa.int32(), nullable=False),
        pa.field("ends_with_stop", pa.bool_(), nullable=False),
        pa.field("extra_id", pa.list_(pa.list_(pa.uint32()))),
        pa.field("extra_behaviour_logprob", pa.list_(pa.list_(pa.float32()))),
    ]
)


def column_of(name: str, axis: Axis = "sequence") -> Column:
    """Look a column up by name; a user column (`x_...`) is float32 on the axis it came with."""
    if name.startswith(USER_PREFIX):
        return Column(name, axis, "float32", "", "any", "carried through untouched")
    return BY_NAME[name]


def expected_shapes(sizes: Mapping[str, int], topk: int, extra: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all columns of a shard whose axes have these sizes.

    Args:
        sizes: entries on each axis.
        topk: K, teacher entries a position.
        extra: M, extra ids a position; with 0 the extra columns are absent.
    """
    widths = {"": (), "K": (topk,), "M": (extra,)}
    return {c.name: (sizes[c.axis], *widths[c.width]) for c in COLUMNS if extra or c.width != "M"}


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
