"""Parts: rollouts in, rollouts out, and what cannot be scored refused by row."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache import jsonfile, parquet_seal, part
from stillroom.cache.errors import CorruptError, InputError, MismatchError, ShapeError
from stillroom.cache.part import (
    PartMeta,
    decode_part,
    encode_part,
    part_name,
    policy_of,
    prompt_id,
    rollout_id,
)
from stillroom.cache.schema import PART_SCHEMA
from stillroom.cache.store import Cache
from tests.cache.conftest import QUICK
from tests.cache.fakes import VOCAB, make_meta, make_rollout, make_table, random_rollouts
from tests.cache.part_twins import USER_TYPES, rollouts

META = make_meta(5, policy=2)


def test_a_name_holds_policy_and_unit() -> None:
    assert META.name == "v000002-0000000000000005"
    assert policy_of(META.name) == 2
    assert part_name(12_345_678, "f" * 16) == "v12345678-ffffffffffffffff"
    assert policy_of(part_name(12_345_678, "f" * 16)) == 12_345_678


@pytest.mark.parametrize(
    "name", ["", "v2-0000000000000005", "v000002-005", "v000002-000000000000000G", META.name + "\n"]
)
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="a part's name"):
        policy_of(name)


def test_hashes_of_prompts_and_rollouts_are_pinned() -> None:
    assert prompt_id(np.array([1, 2, 3], np.uint32)) == prompt_id(np.array([1, 2, 3]))
    assert prompt_id(np.array([1, 2, 3])) == 7764052002911021640
    assert prompt_id(np.array([], np.uint32)) == 3244421341483603138
    assert rollout_id("0" * 16, 3) == 3527997461708894383


@pytest.mark.parametrize("name", PART_SCHEMA.names)
def test_a_missing_column_is_named(name: str) -> None:
    with pytest.raises(ShapeError, match=rf"missing \['{name}'\], unknown \[\]"):
        encode_part(make_table([make_rollout()]).drop_columns([name]), META)


@pytest.mark.parametrize("name", ["reward", "x_", "x_a b", "x_../../a", "X_a", "topk_id"])
def test_an_unknown_column_is_named(name: str) -> None:
    table = make_table([make_rollout()]).append_column(name, pa.array([1.0], pa.float32()))
    with pytest.raises(ShapeError, match=rf"unknown \['{name}'\]"):
        encode_part(table, META)


def test_a_column_that_is_there_twice_is_refused() -> None:
    table = make_table([make_rollout()])
    with pytest.raises(ShapeError, match="2 times"):
        encode_part(table.append_column("prompt", table["prompt"]), META)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", pa.array([[-1]])),
        ("prompt", pa.array([[2**32]])),
        ("prompt", pa.array([None], pa.list_(pa.uint32()))),
        ("completion", pa.array(["text"])),
        ("finish_reason", pa.array([None], pa.string())),
        ("rollout_id", pa.array([-1])),
        ("policy_version_max", pa.array([2**31])),
        ("ends_with_stop", pa.array([None], pa.bool_())),
    ],
)
def test_a_column_of_another_type_is_refused(name: str, values: pa.Array) -> None:
    table = make_table([make_rollout()])
    table = table.set_column(table.column_names.index(name), name, values)
    with pytest.raises(ShapeError, match="the part's column types"):
        encode_part(table, META)


def test_text_in_a_user_column_is_refused() -> None:
    with pytest.raises(ShapeError, match="the part's column types"):
        encode_part(make_table([make_rollout(x_note="q")], x_note=pa.string()), META)


def test_equal_rollouts_give_equal_bytes() -> None:
    first, second = (encode_part(random_rollouts(1, 50), META) for _ in range(2))
    assert first == second


def test_a_flipped_bit_anywhere_is_found_before_anything_is_parsed() -> None:
    data = encode_part(random_rollouts(1, 50), META)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    rng = np.random.default_rng(0)
    anywhere = rng.choice(len(data), 300).tolist()
    in_the_footer = (len(data) - 1 - rng.choice(footer, 300, replace=False)).tolist()
    for at in anywhere + in_the_footer:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(CorruptError, match=r"^here: expected (bytes with hash|a Parquet file)"):
            decode_part(bytes(damaged), "here")


def test_a_part_that_compresses_too_well_is_written_without_compression() -> None:
    rows = [make_rollout(rollout_id=i, completion=[4] * 100_000) for i in range(30)]
    table = make_table(rows)
    data = encode_part(table, META)
    assert len(data) > 30 * 4 * 100_000
    found, meta = decode_part(data, "here")
    assert found["completion"].combine_chunks().flatten().value_counts().to_pylist() == [
        {"values": 4, "counts": 3_000_000}
    ]
    assert meta == META


def test_the_hash_is_of_the_file_with_zeros_in_its_place() -> None:
    data = encode_part(random_rollouts(1, 50), META)
    stored = re.findall(rb"stillroom_hash..([0-9a-f]{32})", data, re.DOTALL)
    assert stored == [jsonfile.digest(data.replace(stored[0], b"0" * 32)).encode()]


@QUICK
@given(st.lists(rollouts(bad=False), min_size=1, max_size=6))
def test_rollouts_come_back(rows: list[dict[str, Any]]) -> None:
    table, meta = decode_part(encode_part(make_table(rows, **USER_TYPES), META), "here")
    assert meta == META
    expected = make_table(rows, **USER_TYPES)
    for name in (*PART_SCHEMA.names, *USER_TYPES):
        assert repr(table[name].to_pylist()) == repr(expected[name].to_pylist())


@pytest.mark.parametrize("kept", [0, 4, 100, -100, -1])
def test_half_a_file_is_refused(kept: int) -> None:
    data = encode_part(random_rollouts(1, 20), META)
    with pytest.raises(
        CorruptError, match=r"^here: expected a Parquet file with its stillroom_hash"
    ):
        decode_part(data[:kept], "here")


def rewritten(metadata: dict[bytes, bytes] | None, columns: list[str] | None = None) -> bytes:
    """A Parquet file with other metadata or fewer columns."""
    import io

    import pyarrow.parquet as pq

    table = make_table([make_rollout()]).select(columns or PART_SCHEMA.names)
    sink = io.BytesIO()
    metadata = metadata and {**metadata, parquet_seal.HASH_KEY: parquet_seal.NO_HASH}
    plain = table.schema.remove_metadata()
    with pq.ParquetWriter(sink, plain, store_schema=False, compression="zstd") as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(table)
    return parquet_seal.seal(sink.getvalue()) if metadata else sink.getvalue()


def test_a_parquet_file_of_another_kind_is_refused() -> None:
    meta = jsonfile.dump({**jsonfile.load(encoded_meta(META), "m")})
    decode_part(rewritten({part.METADATA_KEY: meta}), "here")
    for data in (
        rewritten(None),
        rewritten({b"other": meta}),
        rewritten({part.METADATA_KEY: b"{"}),
        rewritten({part.METADATA_KEY: meta.replace(b'"unit"', b'"units"')}),
        rewritten({part.METADATA_KEY: meta}, ["prompt", "completion"]),
    ):
        with pytest.raises(CorruptError, match=r"^here: "):
            decode_part(data, "here")


def encoded_meta(meta: PartMeta) -> bytes:
    """The metadata that a part of that kind stores."""
    from dataclasses import asdict

    return jsonfile.dump(asdict(meta))


def test_another_format_version_is_refused() -> None:
    meta = encoded_meta(make_meta(format_version=2))
    with pytest.raises(MismatchError, match=r"^here: expected format version 1; got 2"):
        decode_part(rewritten({part.METADATA_KEY: meta}), "here")


def test_the_first_bytes_of_a_part_win(cache: Cache, root: Path) -> None:
    assert not cache.has_part(2, META.unit)
    assert cache.add_part(random_rollouts(1, 5), META)
    before = (root / f"rollouts/{META.name}.parquet").read_bytes()
    assert not cache.add_part(random_rollouts(2, 5), META)
    assert (root / f"rollouts/{META.name}.parquet").read_bytes() == before
    assert cache.has_part(2, META.unit)
    table, meta, digest = cache.read_part(META.name)
    assert (len(table), meta, digest) == (5, META, jsonfile.digest(before))
    assert cache.parts() == cache.unscored() == [META.name]


def test_a_part_of_another_tokenizer_is_refused(cache: Cache) -> None:
    changes: list[dict[str, Any]] = [{"tokenizer_fingerprint": "u"}, {"vocab_size": VOCAB - 1}]
    for change in changes:
        with pytest.raises(MismatchError, match="tokenizer and vocabulary"):
            cache.add_part(random_rollouts(1, 5), make_meta(**change))
    assert cache.parts() == []


def test_parts_come_oldest_policy_first(cache: Cache) -> None:
    metas = [make_meta(number, policy) for number, policy in [(9, 11), (3, 2), (1, 2), (7, 0)]]
    for meta in metas:
        cache.add_part(random_rollouts(1, 2), meta)
    assert cache.parts() == [metas[3].name, metas[2].name, metas[1].name, metas[0].name]
