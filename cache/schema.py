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

FORMAT_VERSION: Final = 1
UNUSED_ID: Final = 2**32 - 1
USER_PREFIX: Final = "x_"
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
