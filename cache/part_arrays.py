"""The columns of a shard that come from its part: every one but the teacher's."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stillroom.cache.errors import ShapeError
from stillroom.cache.extra import extra_arrays
from stillroom.cache.lists import Lists, edges, list_column, places
from stillroom.cache.schema import FINISH_REASONS, SOURCES, USER_PREFIX, Arrays

CARRIED = (
    "prompt_id",
    "group",
    "sample_index",
    "rollout_id",
    "policy_version_min",
    "policy_version_max",
)


def part_arrays(table: pa.Table, extra: int = 0) -> Arrays:
    """All columns of a shard but the teacher's, which the score job adds.

    Args:
        table: a part's rollouts.
        extra: M where the part brings the extra ids; 0 leaves them out.

    Raises:
        ShapeError: a list has another length than its completion.
    """
    prompt, completion, own = (
        list_column(table[name]) for name in ("prompt", "completion", "teacher_prompt")
    )
    start = edges(prompt.lengths + completion.lengths)
    of_completion = places(start[:-1] + prompt.lengths, completion)
    token = np.empty(start[-1], np.uint32)
    token[places(start[:-1], prompt)] = prompt.values
    token[of_completion] = completion.values
    mask = _per_token(table, "scored", completion, np.ones(len(of_completion), np.uint16))
    scored = np.zeros(len(token), np.uint16)
    scored[of_completion] = mask
    kept = mask == 1
    arrays: Arrays = {
        "behaviour_logprob": _floats(table, "behaviour_logprob", completion)[kept],
        "token": token,
        "scored": scored,
        "sequence_start": start.astype(np.uint64),
        "position_start": edges(completion.count_in_row(kept)).astype(np.uint64),
        "teacher_prompt": own.values.astype(np.uint32),
        "teacher_prompt_start": own.start.astype(np.uint64),
        "prompt_length": prompt.lengths.astype(np.uint32),
        "finish_reason": _codes(table, "finish_reason", FINISH_REASONS),
        "source": _codes(table, "source", SOURCES),
        "ends_with_stop": table["ends_with_stop"].to_numpy().astype(np.uint16),
    }
    arrays |= {name: table[name].to_numpy() for name in CARRIED}
    if extra:
        arrays |= extra_arrays(table, kept, completion.start[:-1], extra)
    for name in table.column_names:
        if name.startswith(USER_PREFIX):
            is_list = pa.types.is_list(table.schema.field(name).type)
            per_row = None if is_list else pc.fill_null(table[name], float("nan")).to_numpy()
            arrays[name] = _floats(table, name, completion)[kept] if per_row is None else per_row
    return arrays


def _floats(table: pa.Table, name: str, completion: Lists) -> np.ndarray:
    """(completion tokens,) float32: NaN where the list or the value is null."""
    return _per_token(table, name, completion, np.full(len(completion.values), np.nan, np.float32))


def _per_token(table: pa.Table, name: str, completion: Lists, out: np.ndarray) -> np.ndarray:
    """Lay a list column over the completion tokens; rows without a list stay as they are in
    `out`."""
    lists = list_column(table[name])
    wrong = ~lists.is_null & (lists.lengths != completion.lengths)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        expected = f"{completion.lengths[row]} values, one a completion token"
        do = "Build parts with Cache.add_rollouts or part.encode_part, which refuse such a row."
        raise ShapeError(f"{name!r}, row {row}", expected, f"{lists.lengths[row]}", do)
    out[places(completion.start[:-1], lists)] = lists.values
    return out


def _codes(table: pa.Table, name: str, names: tuple[str, ...]) -> np.ndarray:
    codes = pc.index_in(table[name], value_set=pa.array(names, pa.string()))
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy())[0])
        got = repr(table[name][row].as_py())
        do = "Build parts with Cache.add_rollouts or part.encode_part, which refuse such a row."
        raise ShapeError(f"{name!r}, row {row}", f"one of {names}", got, do)
    numbers: np.ndarray = codes.to_numpy().astype(np.uint16)
    return numbers
