"""Files that are Parquet tables: parts and snapshots."""

from functools import partial
from typing import Any

from stillroom.cache.check_rollouts import check_rows
from stillroom.cache.part import decode_part
from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.rows import score_rows
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
    "part": (lambda: samples("rollouts")[:2], _read_part, mutate_footer, sealed_parquet),
    "snapshot": (partial(samples, "snapshots"), _read_snapshot, mutate_footer, sealed_parquet),
    "thrift": (_footers, _read_thrift, mutate_bytes),
}
