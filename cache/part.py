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
from stillroom.cache.check_rows import NO_LIMIT, check_rows
from stillroom.cache.errors import CorruptError, InputError, MismatchError, ShapeError
from stillroom.cache.lists import list_column
from stillroom.cache.parquet_bounds import check_bounds
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, check_seal, seal
from stillroom.cache.schema import FORMAT_VERSION, PART_SCHEMA, USER_NAME, USER_PREFIX

NAME = re.compile(r"v(\d{6,9})-([0-9a-f]{16})")
METADATA_KEY = b"stillroom"
METADATA_KEYS = (METADATA_KEY, HASH_KEY)


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


def encode_part(
    table: pa.Table, meta: PartMeta, max_length: int = NO_LIMIT, max_extra: int = NO_LIMIT
) -> bytes:
    """Check rollouts and write them as Parquet bytes.

    Args:
        table: one row a sequence.
        meta: what is true of all of them.
        max_length: longest sequence that the teacher reads, in tokens.
        max_extra: extra ids that may stand beside one token.

    Raises:
        InputError: a row cannot be scored; says which, and why.
        ShapeError: a column is missing or has another type.
    """
    table = _cast(table)
    check_rows(table, meta.vocab_size, meta.name, max_length, max_extra)
    metadata = {METADATA_KEY: jsonfile.dump(asdict(meta)), HASH_KEY: NO_HASH}
    data = _write(table, metadata, compression="zstd")
    try:
        check_bounds(data, METADATA_KEYS)
    except ValueError:  # too well compressed to be believed
        data = _write(table, metadata, compression="none", use_dictionary=False)
    return data


def _write(table: pa.Table, metadata: dict[bytes, bytes], **options: Any) -> bytes:
    sink = io.BytesIO()
    options |= {"write_page_checksum": True, "store_schema": False}
    with pq.ParquetWriter(sink, table.schema.remove_metadata(), **options) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(table)
    return seal(sink.getvalue())


def decode_part(data: bytes, where: str) -> tuple[pa.Table, PartMeta]:
    """Read a part's bytes; nothing is parsed before their hash is verified, nor by pyarrow before
    its sizes are.

    Raises:
        CorruptError: they are not a part, or not as they were written.
        MismatchError: another format version wrote it.
    """
    check_seal(data, where, "Restore the file.")
    try:
        check_bounds(data, METADATA_KEYS)
        table = read_parquet(data)
        table.validate(full=True)
        raw = (table.schema.metadata or {})[METADATA_KEY]
        table = _cast(table)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptError(
            where, "a Parquet file of rollouts", str(error), "Restore the file."
        ) from error
    fields = jsonfile.load(raw, where)
    if fields.get("format_version") != FORMAT_VERSION:
        found_version = f"{fields.get('format_version')!r}"
        do = "Use the Stillroom that wrote it."
        raise MismatchError(where, f"format version {FORMAT_VERSION}", found_version, do)
    meta: PartMeta = jsonfile.build(PartMeta, fields, where)
    return table, meta


def decode_rollout_ids(data: bytes, where: str) -> np.ndarray:
    """(rows,) uint64: the rollout ids of a part's bytes, whose hash is verified; nothing else of
    them is decoded.

    Raises:
        CorruptError: they are not a part, or not as they were written.
    """
    check_seal(data, where, "Restore the file.")
    try:
        check_bounds(data, METADATA_KEYS)
        ids = read_parquet(data, ["rollout_id"])["rollout_id"].cast(pa.uint64())
        if ids.null_count:
            raise ValueError("a rollout without an id")
        return np.asarray(ids.to_numpy(), np.uint64)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        expected = "a Parquet file of rollouts"
        raise CorruptError(where, expected, str(error), "Restore the file.") from error


def decode_row_lengths(data: bytes, where: str) -> np.ndarray:
    """(rows,) int64: tokens that the teacher reads for each rollout of a part's bytes, whose hash
    is verified: its own prompt where it has one, and the completion.

    Raises:
        CorruptError: they are not a part, or not as they were written.
    """
    names = ["prompt", "completion", "teacher_prompt"]
    check_seal(data, where, "Restore the file.")
    try:
        check_bounds(data, METADATA_KEYS)
        table = read_parquet(data, names)
        prompt, completion, own = (list_column(table[name]).lengths for name in names)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        expected = "a Parquet file of rollouts"
        raise CorruptError(where, expected, str(error), "Restore the file.") from error
    return np.asarray(np.where(own > 0, own, prompt) + completion)


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Parse the bytes of a Parquet file, or some of its columns, page checksums verified.

    Not `pq.read_table`: its threads abort a process that ends soon after it (pyarrow 26).
    """
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(columns)


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


def _is_list(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
