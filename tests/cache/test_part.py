"""Parts: rollouts in, rollouts out, and what cannot be scored refused by row."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache import jsonfile, part
from stillroom.cache.errors import CorruptError, InputError, MismatchError, ShapeError
from stillroom.cache.part import (
    PartMeta,
    decode_part,
    encode_part,
    part_arrays,
    part_name,
    policy_of,
    prompt_id,
    rollout_id,
)
from stillroom.cache.schema import FINISH_REASONS, PART_SCHEMA, SOURCES, Arrays
from stillroom.cache.store import Cache
from tests.cache.conftest import QUICK
from tests.cache.fakes import VOCAB, make_meta, make_rollout, make_table, random_rollouts

META = make_meta(5, policy=2)
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def arrays_of(rows: list[dict[str, Any]], **user: pa.DataType) -> Arrays:
    """Encode rollouts, decode them, and lay out the columns."""
    table, _ = decode_part(encode_part(make_table(rows, **user), META), "here")
    return part_arrays(table)


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


@st.composite
def rollouts(draw: st.DrawFn) -> dict[str, Any]:
    """Any rollout that can be scored."""
    prompt, completion = draw(IDS), draw(IDS)
    n = len(completion)
    logprob = st.floats(max_value=0, width=32) | st.just(float("nan"))
    mask = st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(any)
    return make_rollout(
        prompt=prompt,
        completion=completion,
        prompt_name=draw(st.none() | st.text(max_size=5)),
        scored=draw(st.none() | mask),
        behaviour_logprob=draw(st.none() | st.lists(logprob, min_size=n, max_size=n)),
        teacher_prompt=draw(st.none() | st.just([]) | IDS),
        finish_reason=draw(st.sampled_from(FINISH_REASONS)),
        source=draw(st.sampled_from(SOURCES)),
        rollout_id=draw(st.integers(0, 2**64 - 1)),
        group=draw(st.integers(0, 2**64 - 1)),
        policy_version_min=draw(st.integers(-1, 2**31 - 1)),
        ends_with_stop=draw(st.booleans()),
    )


@QUICK
@given(st.lists(rollouts(), min_size=1, max_size=6))
def test_rollouts_come_back_and_are_laid_end_to_end(rows: list[dict[str, Any]]) -> None:
    table, meta = decode_part(encode_part(make_table(rows), META), "here")
    assert meta == META
    expected = make_table(rows).cast(PART_SCHEMA)
    for name in PART_SCHEMA.names:
        assert repr(table[name].to_pylist()) == repr(expected[name].to_pylist())
    arrays = part_arrays(table)
    tokens, scored, own = list[int](), list[int](), list[int]()
    behaviour = list[float]()
    for row in rows:
        mask = row["scored"] or [1] * len(row["completion"])
        logprob = row["behaviour_logprob"] or [np.nan] * len(mask)
        tokens += row["prompt"] + row["completion"]
        scored += [0] * len(row["prompt"]) + mask
        behaviour += [x for x, keep in zip(logprob, mask, strict=True) if keep]
        own += row["teacher_prompt"] or []
    assert arrays["token"].tolist() == tokens
    assert arrays["scored"].tolist() == scored
    assert arrays["teacher_prompt"].tolist() == own
    assert np.array_equal(
        arrays["behaviour_logprob"], np.array(behaviour, np.float32), equal_nan=True
    )
    lengths = [len(row["prompt"] + row["completion"]) for row in rows]
    assert np.diff(arrays["sequence_start"]).tolist() == lengths
    counts = [sum(row["scored"] or [1] * len(row["completion"])) for row in rows]
    assert np.diff(arrays["position_start"]).tolist() == counts
    assert arrays["prompt_length"].tolist() == [len(row["prompt"]) for row in rows]
    assert arrays["rollout_id"].tolist() == [row["rollout_id"] for row in rows]
    codes = [FINISH_REASONS.index(row["finish_reason"]) for row in rows]
    assert arrays["finish_reason"].tolist() == codes
    assert arrays["source"].tolist() == [SOURCES.index(row["source"]) for row in rows]
    assert arrays["ends_with_stop"].tolist() == [row["ends_with_stop"] for row in rows]


def test_a_scored_mask_drops_positions_and_their_logprobs() -> None:
    row = make_rollout(
        completion=[4, 5, 6, 7], scored=[0, 1, 0, 1], behaviour_logprob=[-1.0, -2.0, -3.0, -4.0]
    )
    arrays = arrays_of([row, make_rollout()])
    assert arrays["scored"].tolist() == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    assert arrays["position_start"].tolist() == [0, 2, 4]
    assert arrays["behaviour_logprob"][:2].tolist() == [-2.0, -4.0]
    assert np.isnan(arrays["behaviour_logprob"][2:]).all()


def test_user_columns_arrive_per_sequence_and_per_token() -> None:
    rows = [
        make_rollout(x_reward=0.5, x_weight=[1.0, 2.0], scored=[0, 1]),
        make_rollout(x_reward=None, x_weight=None),
        make_rollout(x_reward=-1.0, x_weight=[3.0, None]),
    ]
    arrays = arrays_of(rows, x_reward=pa.float64(), x_weight=pa.list_(pa.float64()))
    assert arrays["x_reward"].dtype == arrays["x_weight"].dtype == np.float32
    assert repr(arrays["x_reward"].tolist()) == "[0.5, nan, -1.0]"
    assert repr(arrays["x_weight"].tolist()) == "[2.0, nan, nan, 3.0, nan]"


def test_large_lists_and_other_integers_are_taken() -> None:
    large = pa.large_list(pa.int64())
    fields = [f.with_type(large) if pa.types.is_list(f.type) else f for f in PART_SCHEMA]
    rows = [make_rollout(scored=[1, 1], x_weight=[1, 2])]
    table = make_table(rows, x_weight=pa.large_list(pa.float64()))
    wide = table.cast(pa.schema([*fields[:8], *table.schema][:8] + list(table.schema)[8:]))
    arrays = part_arrays(decode_part(encode_part(wide, META), "here")[0])
    assert arrays["token"].tolist() == [1, 2, 3, 4, 5]
    assert arrays["x_weight"].tolist() == [1, 2]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": []}, "an empty prompt"),
    "no completion": ({"completion": []}, "an empty completion"),
    "a large id": ({"completion": [4, VOCAB]}, f"token id {VOCAB}, but the vocabulary has {VOCAB}"),
    "a large id in the prompt": ({"prompt": [2**32 - 1]}, "token id 4294967295"),
    "a large id for the teacher": ({"teacher_prompt": [VOCAB]}, f"token id {VOCAB}"),
    "no id": ({"completion": [4, None]}, "a token without an id"),
    "a short mask": ({"scored": [1]}, "1 values of 'scored' for 2 completion tokens"),
    "an empty mask": ({"scored": []}, "0 values of 'scored'"),
    "a mask of zeros": ({"scored": [0, 0]}, "a 'scored' mask with no 1"),
    "a mask with 2": ({"scored": [1, 2]}, "other values than 0 and 1"),
    "a mask with a gap": ({"scored": [1, None]}, "other values than 0 and 1"),
    "few logprobs": ({"behaviour_logprob": [-1.0]}, "1 values of 'behaviour_logprob'"),
    "a positive logprob": ({"behaviour_logprob": [-1.0, 1e-3]}, "a behaviour logprob above 0"),
    "an infinite logprob": ({"behaviour_logprob": [-1.0, np.inf]}, "a behaviour logprob above 0"),
    "another finish": ({"finish_reason": "tired"}, "finish_reason 'tired'"),
    "another source": ({"source": "me"}, "source 'me'"),
}


@pytest.mark.parametrize(("change", "problem"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_scored_is_named(change: dict[str, Any], problem: str) -> None:
    rows = [make_rollout(), make_rollout(), make_rollout(**change), make_rollout(prompt=[])]
    where = f"{META.name}, row 2: expected a rollout that can be scored; got "
    with pytest.raises(InputError, match=f"^{where}.*{re.escape(problem)}"):
        encode_part(make_table(rows), META)


def test_a_user_column_of_another_length_is_named() -> None:
    rows = [make_rollout(x_weight=[1.0, 2.0]), make_rollout(x_weight=[1.0])]
    with pytest.raises(InputError, match=r"row 1: .*1 values of 'x_weight' for 2"):
        encode_part(make_table(rows, x_weight=pa.list_(pa.float32())), META)


def test_a_row_that_the_teacher_cannot_read_whole_is_named() -> None:
    rows = [make_rollout(teacher_prompt=[1]), make_rollout(), make_rollout(teacher_prompt=[1] * 4)]
    encode_part(make_table(rows[:2]), META, max_length=5)
    with pytest.raises(InputError, match=r"row 1: .*got 5 tokens; the teacher reads 4"):
        encode_part(make_table(rows), META, max_length=4)
    with pytest.raises(InputError, match=r"row 2: .*got 6 tokens; the teacher reads 5"):
        encode_part(make_table(rows), META, max_length=5)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match=f"^{META.name}: expected at least one rollout"):
        encode_part(make_table([]), META)


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


def test_a_flipped_byte_of_the_data_is_found() -> None:
    data = encode_part(random_rollouts(1, 50), META)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    table, _ = decode_part(data, "here")
    rng, refused = np.random.default_rng(0), 0
    for at in rng.choice(len(data) - footer, 200).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            assert decode_part(bytes(damaged), "here")[0].equals(table)
        except CorruptError:
            refused += 1
    assert refused > 100


def test_a_flipped_byte_of_the_footer_raises_nothing_else() -> None:
    data = encode_part(random_rollouts(1, 20), META)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    rng = np.random.default_rng(0)
    for at in (len(data) - 1 - rng.choice(footer, 300)).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            decode_part(bytes(damaged), "here")
        except (CorruptError, MismatchError) as error:
            assert error.where == "here"  # noqa: PT017


@pytest.mark.parametrize("kept", [0, 4, 100, -100, -1])
def test_half_a_file_is_refused(kept: int) -> None:
    data = encode_part(random_rollouts(1, 20), META)
    with pytest.raises(CorruptError, match=r"^here: expected a Parquet file of rollouts"):
        decode_part(data[:kept], "here")


def rewritten(metadata: dict[bytes, bytes] | None, columns: list[str] | None = None) -> bytes:
    """A Parquet file with other metadata or fewer columns."""
    import io

    import pyarrow.parquet as pq

    table = make_table([make_rollout()]).select(columns or PART_SCHEMA.names)
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return sink.getvalue()


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
