"""Files that are Parquet tables: parts and snapshots."""

import io
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow.parquet as pq

from stillroom.cache import jsonfile
from stillroom.cache.check_rows import check_rows
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, seal
from stillroom.cache.part import METADATA_KEY, decode_part
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.score_rows import score_rows
from stillroom.cache.snapshot_file import decode_commits
from stillroom.cache.store import Cache
from stillroom.cache.thrift_reader import read_struct
from stillroom.tools.listing import list_parts
from tests.cache.fakes import VOCAB
from tests.fuzz.attempt import attempt
from tests.fuzz.hostile import sealed_parquet
from tests.fuzz.marks import samples
from tests.fuzz.memory import MemoryStorage, small_cache
from tests.fuzz.mutate import mutate_bytes, mutate_footer
from tests.tools.small_cache import UNSCORED


def _parts() -> list[bytes]:
    """A part as it is written, and one without compression and checksums, whose pages are reached
    by any change."""
    [first, *_] = samples("rollouts")
    table, meta = decode_part(first, "part")
    sink = io.BytesIO()
    plain = {"compression": "none", "store_schema": False}
    with pq.ParquetWriter(sink, table.schema.remove_metadata(), **plain) as writer:
        writer.add_key_value_metadata(
            {METADATA_KEY: jsonfile.dump(asdict(meta)), HASH_KEY: NO_HASH}
        )
        writer.write_table(table)
    return [first, seal(sink.getvalue())]


def _read_part(data: bytes) -> None:
    """As `ls` and the score job read it."""
    storage = MemoryStorage({f"rollouts/{UNSCORED}.parquet": data})
    attempt(lambda: list_parts(Cache(storage, small_cache("zarr").identity)))
    table, meta = decode_part(data, "part")
    check_rows(table, VOCAB, meta.name, 64, 2)
    score_rows(part_arrays(table, 2))


def _read_snapshot(data: bytes) -> None:
    decode_commits(data, "snapshot")


def _read_thrift(data: bytes) -> None:
    try:
        read_struct(data)
    except ValueError:
        return


def _footers() -> list[bytes]:
    files = samples("rollouts")[:1] + samples("snapshots")[:1]
    return [data[-8 - int.from_bytes(data[-8:-4], "little") : -8] for data in files]


KINDS: dict[str, tuple[Any, ...]] = {
    "part": (_parts, _read_part, mutate_footer, sealed_parquet),
    "snapshot": (partial(samples, "snapshots"), _read_snapshot, mutate_footer, sealed_parquet),
    "thrift": (_footers, _read_thrift, mutate_bytes),
}
