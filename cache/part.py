"""A part: one Parquet file of rollouts, the unit of scoring work.

Its columns are `schema.PART_SCHEMA`, one row a sequence, and any float column named `x_...`. Its
name is `v<policy, six digits>-<unit, sixteen hexadecimal digits>`: the same planned work always has
the same name, so a rerun never adds a part for work that has one.
"""

import io
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, InputError, MismatchError, ShapeError
from stillroom.cache.schema import (
    FINISH_REASONS,
    FORMAT_VERSION,
    PART_SCHEMA,
    SOURCES,
    USER_NAME,
    USER_PREFIX,
    Arrays,
)

NAME = re.compile(r"v(\d{6,9})-([0-9a-f]{16})")
METADATA_KEY = b"stillroom"
NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PartMeta:
    """What is true of every rollout of a part."""

    policy_version: int
    """Policy that sampled it; 0 is the initial student."""
    unit: str
    """16 hexadecimal digits: hash of the planned work."""
    tokenizer_fingerprint: str
    vocab_size: int
    sampler: dict[str, Any]
    """Sampler settings: temperature, top_p, top_k, ..., and whether logprobs are after filters."""
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The part's name."""
        return part_name(self.policy_version, self.unit)


def part_name(policy_version: int, unit: str) -> str:
    """Name of the part that holds a unit's rollouts."""
    return f"v{policy_version:06d}-{unit}"


def policy_of(part: str) -> int:
    """Policy version in a part's name.

    Raises:
        InputError: it is not the name of a part.
    """
    match = NAME.fullmatch(part)
    if match is None:
        raise InputError(
            part,
            "a part's name, v<policy>-<unit>",
            "another",
            "List the parts with 'stillroom ls'.",
        )
    return int(match[1])


def prompt_id(prompt: np.ndarray) -> int:
    """Hash of a prompt's token ids."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(prompt, "<u4").tobytes())


def rollout_id(unit: str, index: int) -> int:
    """Hash that names the index-th rollout of a unit."""
    return xxhash.xxh3_64_intdigest(f"{unit}/{index}".encode())


def encode_part(table: pa.Table, meta: PartMeta, max_length: int = NO_LIMIT) -> bytes:
    """Check rollouts and write them as Parquet bytes.

    Args:
        table: one row a sequence.
        meta: what is true of all of them.
        max_length: longest sequence that the teacher reads, in tokens.

    Raises:
        InputError: a row cannot be scored; says which, and why.
        ShapeError: a column is missing or has another type.
    """
    table = _cast(table)
    check_rows(table, meta.vocab_size, meta.name, max_length)
    metadata = {METADATA_KEY: jsonfile.dump(asdict(meta))}
    sink = io.BytesIO()
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def decode_part(data: bytes, where: str) -> tuple[pa.Table, PartMeta]:
    """Read a part's bytes.

    Raises:
        CorruptError: they are not a part.
        MismatchError: another format version wrote it.
    """
    try:
        table = read_parquet(data)
        raw = (table.schema.metadata or {})[METADATA_KEY]
        table = _cast(table)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(
            where, "a Parquet file of rollouts", str(error), "Restore the file."
        ) from error
    fields = jsonfile.load(raw, where)
    if fields.get("format_version") != FORMAT_VERSION:
        found = f"{fields.get('format_version')!r}"
        raise MismatchError(
            where, f"format version {FORMAT_VERSION}", found, "Use the Stillroom that wrote it."
        )
    meta: PartMeta = jsonfile.build(PartMeta, fields, where)
    return table, meta


def read_parquet(data: bytes) -> pa.Table:
    """Parse the bytes of a Parquet file, page checksums verified.

    Not `pq.read_table`: its threads abort a process that ends soon after it (pyarrow 26).
    """
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()


def check_rows(table: pa.Table, vocab_size: int, where: str, max_length: int = NO_LIMIT) -> None:
    """Refuse rollouts that cannot be scored: no tokens, ids out of range, lists of unequal length.

    Raises:
        InputError: names the first such row; or there is none at all.
    """
    if not len(table):
        raise InputError(where, "at least one rollout", "none", "Leave the part out.")
    user = [n for n in table.column_names if n.startswith(USER_PREFIX)]
    per_token = ["scored", "behaviour_logprob", *(n for n in user if _is_list(table, n))]
    names = ["prompt", "completion", "finish_reason", "source", "teacher_prompt", *per_token]
    for row, item in enumerate(table.select(names).to_pylist()):
        problem = _problem(item, vocab_size, per_token) or _too_long(item, max_length)
        if problem:
            do = "Leave the row out, or repair it."
            raise InputError(f"{where}, row {row}", "a rollout that can be scored", problem, do)


def part_arrays(table: pa.Table) -> Arrays:
    """All columns of a shard but the teacher's, which the score job adds."""
    prompts, completions = _lists(table, "prompt"), _lists(table, "completion")
    scored = [
        _scored_mask(table, i, len(p), len(c))
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    behaviour = [
        _completion_floats(table["behaviour_logprob"][i].as_py(), mask[len(p) :])
        for i, (p, mask) in enumerate(zip(prompts, scored, strict=True))
    ]
    teacher_prompts = [np.asarray(v.as_py() or [], np.uint32) for v in table["teacher_prompt"]]
    sequences = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    arrays: Arrays = {
        "behaviour_logprob": np.concatenate(behaviour, dtype=np.float32),
        "token": np.concatenate(sequences, dtype=np.uint32),
        "scored": np.concatenate(scored, dtype=np.uint16),
        "sequence_start": _edges([len(s) for s in sequences]),
        "position_start": _edges([int(mask.sum()) for mask in scored]),
        "teacher_prompt": np.concatenate(teacher_prompts, dtype=np.uint32),
        "teacher_prompt_start": _edges([len(t) for t in teacher_prompts]),
        "prompt_length": np.array([len(p) for p in prompts], np.uint32),
        "finish_reason": _codes(table, "finish_reason", FINISH_REASONS),
        "source": _codes(table, "source", SOURCES),
        "ends_with_stop": np.asarray(table["ends_with_stop"].to_pylist(), np.uint16),
    }
    for name in (
        "prompt_id",
        "group",
        "sample_index",
        "rollout_id",
        "policy_version_min",
        "policy_version_max",
    ):
        arrays[name] = table[name].to_numpy()
    for name in table.column_names:
        if name.startswith(USER_PREFIX):
            arrays[name] = _user_column(table, name, prompts, scored)
    return arrays


def _cast(table: pa.Table) -> pa.Table:
    user = [n for n in table.column_names if USER_NAME.fullmatch(n)]
    wanted = [*PART_SCHEMA.names, *user]
    missing, unknown = (
        sorted(set(wanted) - set(table.column_names)),
        sorted(set(table.column_names) - set(wanted)),
    )
    if missing or unknown:
        raise ShapeError(
            "rollouts",
            f"the columns {PART_SCHEMA.names} and {USER_PREFIX}NAME",
            f"missing {missing}, unknown {unknown}",
            "Add or rename them.",
        )
    kinds = [pa.list_(pa.float32()) if _is_list(table, n) else pa.float32() for n in user]
    schema = pa.schema([*PART_SCHEMA, *(pa.field(n, k) for n, k in zip(user, kinds, strict=True))])
    try:
        return table.select(wanted).cast(schema)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise ShapeError(
            "rollouts", "the part's column types", str(error), "See docs/format.md."
        ) from error


def _problem(item: dict[str, Any], vocab_size: int, per_token: list[str]) -> str | None:
    prompt, completion = item["prompt"], item["completion"]
    if not prompt or not completion:
        return "an empty prompt" if not prompt else "an empty completion"
    tokens = [*prompt, *completion, *(item["teacher_prompt"] or [])]
    if None in tokens:
        return "a token without an id"
    largest = max(tokens)
    if largest >= vocab_size:
        return f"token id {largest}, but the vocabulary has {vocab_size}"
    if item["finish_reason"] not in FINISH_REASONS:
        return f"finish_reason {item['finish_reason']!r}, which is none of {FINISH_REASONS}"
    if item["source"] not in SOURCES:
        return f"source {item['source']!r}, which is none of {SOURCES}"
    for name in per_token:
        if item[name] is not None and len(item[name]) != len(completion):
            return f"{len(item[name])} values of {name!r} for {len(completion)} completion tokens"
    if item["scored"] is not None and (not any(item["scored"]) or set(item["scored"]) - {0, 1}):
        return "a 'scored' mask with no 1, or with other values than 0 and 1"
    if any(v is not None and v > 0 for v in item["behaviour_logprob"] or []):
        return "a behaviour logprob above 0"
    return None


def _too_long(item: dict[str, Any], max_length: int) -> str | None:
    length = len(item["teacher_prompt"] or item["prompt"]) + len(item["completion"])
    return f"{length} tokens; the teacher reads {max_length}" if length > max_length else None


def _is_list(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _lists(table: pa.Table, name: str) -> list[np.ndarray]:
    return [np.asarray(value.as_py(), np.uint32) for value in table[name]]


def _scored_mask(table: pa.Table, row: int, prompt: int, completion: int) -> np.ndarray:
    given = table["scored"][row].as_py()
    mask = np.ones(completion, np.uint16) if given is None else np.asarray(given, np.uint16)
    return np.concatenate([np.zeros(prompt, np.uint16), mask])


def _completion_floats(values: list[float] | None, mask: np.ndarray) -> np.ndarray:
    filled = (
        np.full(len(mask), np.nan, np.float32) if values is None else np.asarray(values, np.float32)
    )
    kept: np.ndarray = filled[mask == 1]
    return kept


def _user_column(
    table: pa.Table, name: str, prompts: list[np.ndarray], scored: list[np.ndarray]
) -> np.ndarray:
    if not _is_list(table, name):
        return np.asarray(table[name].to_pylist(), np.float32)
    rows = [
        _completion_floats(table[name][i].as_py(), mask[len(p) :])
        for i, (p, mask) in enumerate(zip(prompts, scored, strict=True))
    ]
    return np.concatenate(rows, dtype=np.float32)


def _codes(table: pa.Table, name: str, names: tuple[str, ...]) -> np.ndarray:
    return np.array([names.index(v) for v in table[name].to_pylist()], np.uint16)


def _edges(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
