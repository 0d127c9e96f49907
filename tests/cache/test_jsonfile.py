"""Canonical JSON."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from tests.cache.conftest import QUICK

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
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
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^here: expected a JSON object"):
        jsonfile.load(data, "here")


def test_too_many_bytes_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfile, "MAX_BYTES", 7)
    assert jsonfile.load(b'{"a":1}', "here") == {"a": 1}
    with pytest.raises(CorruptError, match="at most 7 bytes; got 8 bytes"):
        jsonfile.load(b'{"a":11}', "here")


def test_build_takes_exactly_the_fields() -> None:
    fields = {"name": "n", "count": 3, "seconds": 2}
    assert jsonfile.build(Record, fields, "here") == Record("n", 3, 2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "n"}, "count"),
        ({"name": "n", "count": 1, "other": 2}, "other"),
        ({"name": "n", "count": "1"}, "count"),
        ({"name": "n", "count": 1.0}, "count"),
        ({"name": None, "count": 1}, "name"),
        ({"name": "n", "count": 1, "seconds": "2"}, "seconds"),
    ],
)
def test_build_refuses_other_fields_and_kinds(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptError, match=rf"^here: expected the fields of Record; got .*{named}"):
        jsonfile.build(Record, fields, "here")
