"""No byte of a sealed Parquet file changes unnoticed."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.parquet_seal import HASH_KEY, NO_HASH, check_seal, seal


def written(metadata: dict[bytes, bytes]) -> bytes:
    """A small file with that metadata."""
    table, sink = pa.table({"a": [1, 2, 3]}), io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(table)
    return sink.getvalue()


SEALED = seal(written({HASH_KEY: NO_HASH, b"other": b"x"}))


def test_a_sealed_file_passes_and_opens() -> None:
    check_seal(SEALED, "here", "Restore it.")
    table = pq.ParquetFile(io.BytesIO(SEALED)).read()
    assert table["a"].to_pylist() == [1, 2, 3]
    assert HASH_KEY in table.schema.metadata


def test_every_changed_byte_is_refused() -> None:
    for at in range(len(SEALED)):
        changed = bytearray(SEALED)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptError, match=r"^here: .* Restore it\.$"):
            check_seal(bytes(changed), "here", "Restore it.")


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", SEALED[:-1], SEALED[4:], SEALED + b"\0", written({}), b"\xff" * 40],
    ids=range(7),
)
def test_what_is_not_whole_or_not_sealed_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^here: "):
        check_seal(data, "here", "Restore it.")


def test_a_file_without_the_place_cannot_be_sealed() -> None:
    with pytest.raises(CorruptError):
        seal(written({b"other": b"x"}))
