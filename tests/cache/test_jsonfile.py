"""Canonical JSON."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from tests.cache.conftest import QUICK

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@dataclass(frozen=True)
class Record:
    """What `build` makes here."""

    name: str
    count: int
    seconds: float = 0.0
    notes: dict[str, Any] | None = None
    shape: tuple[int, ...] = ()
    places: dict[str, tuple[str, float]] | None = None
    strict: bool = False


WHOLE: dict[str, Any] = {
    "name": "n",
    "count": 3,
    "seconds": 2,
    "notes": {"a": [1, None]},
    "shape": (4, 5),
    "places": {"here": ("x", 1.5)},
    "strict": True,
}


@QUICK
@given(st.dictionaries(st.text(), VALUES))
def test_what_was_dumped_loads(value: dict[str, Any]) -> None:
    assert jsonfile.load(jsonfile.dump(value), "here") == value


@QUICK
@given(st.dictionaries(st.text(), VALUES))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert jsonfile.dump(dict(reversed(value.items()))) == jsonfile.dump(value)


def test_bytes_and_hash_are_pinned() -> None:
    data = jsonfile.dump({"b": [1, 2.5, None], "a": "é", "c": True})
    assert data == b'{"a":"\\u00e9","b":[1,2.5,null],"c":true}'
    assert jsonfile.digest(data) == "43a233d400d421522ca2c86d137bf277"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonfile.dump({"a": value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"[1]",
        b"1",
        b"null",
        b'{"a":1}{}',
        b'\xff{"a":1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 32 + b"]" * 32 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":18446744073709551616}',
        b'{"a":-9223372036854775809}',
        b'{"a":1e400}',
        b'{"a":-1e400}',
        b'{"a":1,"a":1}',
        b'{"b":[{"a":1,"c":2,"a":3}]}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\uDC00\\uD800"}',
        b'{"\\udfff":1}',
        b'{"a":"\n"}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-32"),
        b'\xef\xbb\xbf{"a":1}',
    ],
)
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^here: expected a JSON object"):
        jsonfile.load(data, "here")


def test_the_limits_are_met_by_what_is_just_within() -> None:
    deep = b'{"a":' + b"[" * 31 + b"]" * 31 + b"}"
    assert jsonfile.dump(jsonfile.load(deep, "here")) == deep
    ends = {"least": -(2**63), "most": 2**64 - 1, "float": 1e308, "text": "\U0001f600"}
    assert jsonfile.load(jsonfile.dump(ends), "here") == ends


@QUICK
@given(st.lists(st.text('[]{}"\\a'), max_size=20))
def test_brackets_in_texts_are_no_levels(texts: list[str]) -> None:
    value = {"texts": texts, "more": "[{" * 50}
    assert jsonfile.load(jsonfile.dump(value), "here") == value


@pytest.mark.parametrize("text", [b'\\"' * 40_000, b'"' * 40_001, b'"' + b"\\" * 40_001])
def test_broken_quotes_are_read_once(text: bytes) -> None:
    with pytest.raises(CorruptError, match="a JSON object"):
        jsonfile.load(b"[" * 40 + text, "here")


def test_a_file_of_nothing_but_arrays_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfile, "MAX_CONTAINERS", 100)
    assert jsonfile.load(b'{"a":[' + b"[]," * 97 + b"[]]}", "here")["a"] == [[]] * 98
    with pytest.raises(CorruptError, match="more than 100 arrays and objects"):
        jsonfile.load(b'{"a":[' + b"[]," * 98 + b"[]]}", "here")


@settings(QUICK, max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_corrupt(data: bytes) -> None:
    for given_bytes in (data, b'{"a":' + data + b"}"):
        try:
            value = jsonfile.load(given_bytes, "here")
        except CorruptError:
            continue
        assert value == json.loads(given_bytes)


def test_too_many_bytes_are_refused_unread() -> None:
    assert jsonfile.load(b'{"a":1}', "here", max_bytes=7) == {"a": 1}
    with pytest.raises(CorruptError, match="at most 7 bytes; got 8 bytes"):
        jsonfile.load(b'{"a":11}', "here", max_bytes=7)


def test_build_takes_exactly_the_fields() -> None:
    assert jsonfile.build(Record, WHOLE, "here") == Record(**WHOLE)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_build_needs_every_field(name: str) -> None:
    fields = {key: value for key, value in WHOLE.items() if key != name}
    with pytest.raises(CorruptError, match=rf"^here: expected the fields of Record; got .*{name}"):
        jsonfile.build(Record, fields, "here")


@pytest.mark.parametrize(
    "changed",
    [
        {"other": 2},
        {"count": "1"},
        {"count": 1.0},
        {"count": True},
        {"count": None},
        {"name": None},
        {"name": 1},
        {"seconds": "2"},
        {"seconds": True},
        {"notes": []},
        {"notes": {1: 2}},
        {"shape": [4, 5]},
        {"shape": (4, 5.0)},
        {"shape": (4, True)},
        {"places": {"here": ("x",)}},
        {"places": {"here": ("x", "y")}},
        {"places": {"here": ["x", 1.5]}},
        {"strict": 1},
    ],
)
def test_build_refuses_other_fields_and_kinds(changed: dict[str, Any]) -> None:
    (name,) = changed
    with pytest.raises(CorruptError, match=rf"^here: expected the fields of Record; got .*{name}"):
        jsonfile.build(Record, WHOLE | changed, "here")


def test_a_sealed_file_is_canonical_and_ends_with_its_hash() -> None:
    value = {"b": 1, "a": ["x"], "working": True}
    data = jsonfile.dump_sealed(value)
    body, _, end = data.rpartition(b',"xxh3_128":"')
    assert end == jsonfile.digest(body).encode() + b'"}'
    assert data == jsonfile.dump(json.loads(data))
    assert jsonfile.load_sealed(data, "here") == value


def test_no_byte_of_a_sealed_file_changes_unnoticed() -> None:
    data = jsonfile.dump_sealed({"a": 1.25, "b": "text"})
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises(CorruptError, match=r"^here: expected an end of "):
                jsonfile.load_sealed(bytes(changed), "here")
    for other in (b"", data[:-1], data[1:], data + b"\n", jsonfile.dump({"a": 1})):
        with pytest.raises(CorruptError, match=r"^here: "):
            jsonfile.load_sealed(other, "here")


def test_a_sealed_file_is_bounded_too() -> None:
    data = jsonfile.dump_sealed({"a": "x" * 100})
    with pytest.raises(CorruptError, match="at most 50 bytes"):
        jsonfile.load_sealed(data, "here", 50)
