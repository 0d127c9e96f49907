"""The manifest: what could not be true of a shard is refused."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from tests.cache.conftest import QUICK


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of two arrays, three chunks."""
    token = (Chunk(0, 10, "a" * 32), Chunk(10, 5, "b" * 32))
    fields: dict[str, Any] = {
        "part": "v000000-0000000000000000",
        "attempt": "0" * 32,
        "identity": "i",
        "size": 100,
        "hash": "c" * 32,
        "arrays": {
            "token": ArrayEntry("uint32", (2049,), token),
            "topk_id": ArrayEntry("uint32", (7, 3), (Chunk(15, 85, "d" * 32),)),
            "x_reward": ArrayEntry("float32", (2,), (Chunk(15, 85, "d" * 32),)),
        },
        "row_groups": (2, 1),
        "attributes": {"user_axes": {"x_reward": "sequence"}},
    }
    return Manifest(**fields | changes)


@pytest.mark.parametrize("changes", [{}, {"row_groups": ()}])
def test_round_trip(changes: dict[str, Any]) -> None:
    manifest = make_manifest(**changes)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_bytes_are_canonical() -> None:
    data = make_manifest(arrays={}, attributes={"user_axes": {}}).to_json()
    assert data == jsonfile.dump(json.loads(data))
    assert json.loads(data).keys() == {
        "part",
        "attempt",
        "identity",
        "size",
        "hash",
        "arrays",
        "row_groups",
        "attributes",
        "format_version",
    }


def _at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        del manifest[key]

    return change


TOKEN = ("arrays", "token")
HOSTILE = {
    "a negative offset": _at(*TOKEN, "chunks", 0, 0, value=-1),
    "a chunk past the end": _at(*TOKEN, "chunks", 0, 0, value=95),
    "a huge length": _at(*TOKEN, "chunks", 0, 1, value=2**63),
    "an empty chunk": _at(*TOKEN, "chunks", 0, 1, value=0),
    "a negative length": _at(*TOKEN, "chunks", 0, 1, value=-5),
    "an infinite offset": _at(*TOKEN, "chunks", 0, 0, value=float("1e999")),
    "a chunk that is no list": _at(*TOKEN, "chunks", 0, value=3),
    "a chunk of two": _at(*TOKEN, "chunks", 0, value=[0, 10]),
    "a chunk with another key": _at(*TOKEN, "chunks", 0, value={"offset": 0}),
    "chunks that are a number": _at(*TOKEN, "chunks", value=3),
    "an offset that is text": _at(*TOKEN, "chunks", 0, 0, value="first"),
    "a huge count of rows": _at(*TOKEN, "shape", value=[10**18]),
    "a negative count of rows": _at(*TOKEN, "shape", value=[-1]),
    "no dimension": _at(*TOKEN, "shape", value=[]),
    "three dimensions": _at(*TOKEN, "shape", value=[2049, 1, 1]),
    "an infinite dimension": _at(*TOKEN, "shape", value=[float("1e999")]),
    "a shape that is a number": _at(*TOKEN, "shape", value=5),
    "many numbers": _at(*TOKEN, "shape", value=[2**21, 2**21]),
    "a dtype that no column has": _at(*TOKEN, "dtype", value="complex64"),
    "objects": _at(*TOKEN, "dtype", value="object"),
    "a dtype of another byte order": _at(*TOKEN, "dtype", value=">u4"),
    "a dtype of fields": _at(*TOKEN, "dtype", value="u4,u4"),
    "a dtype that is a list": _at(*TOKEN, "dtype", value=[["a", "u4"]]),
    "no dtype": _at(*TOKEN, "dtype", value=None),
    "row groups that are a number": _at("row_groups", value=3),
    "row groups that are null": _at("row_groups", value=None),
    "a row group that is text": _at("row_groups", 0, value="many"),
    "no row groups": _without("row_groups"),
    "an array that is null": _at(*TOKEN, value=None),
    "arrays that are a list": _at("arrays", value=[]),
    "no arrays": _without("arrays"),
    "no size": _without("size"),
    "a size that is text": _at("size", value="100"),
    "a small size": _at("size", value=50),
    "an unknown field": _at("other", value=1),
    "no attributes": _without("attributes"),
    "no axes": _at("attributes", value={}),
    "axes of no user column": _at("attributes", "user_axes", value={}),
    "axes of an absent column": _at("attributes", "user_axes", "x_other", value="sequence"),
    "an unknown axis": _at("attributes", "user_axes", "x_reward", value="token"),
    "an axis that is a list": _at("attributes", "user_axes", "x_reward", value=[]),
    "axes that are a list": _at("attributes", "user_axes", value=["x_reward"]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_not_possible_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(make_manifest().to_json())
    change(value)
    with pytest.raises(CorruptError, match=r"^here: "):
        Manifest.from_json(json.dumps(value).encode().replace(b"Infinity", b"1e999"), "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@QUICK
@given(st.sampled_from(sorted(json.loads(make_manifest().to_json()))), JSON)
def test_any_other_value_of_a_field_is_taken_or_refused(name: str, other: object) -> None:
    value = json.loads(make_manifest().to_json())
    value[name] = other
    with suppress(CorruptError):
        Manifest.from_json(json.dumps(value).encode(), "here")


def test_shapes_must_be_the_expected_ones() -> None:
    manifest = make_manifest()
    shapes = {"token": (2049,), "topk_id": (7, 3), "x_reward": (2,)}
    manifest.check_shapes(shapes, "here")
    for wrong, named in [
        (shapes | {"topk_id": (7, 4)}, "topk_id"),
        (shapes | {"x_reward": (3,)}, "x_reward"),
        (shapes | {"scored": (1,)}, "scored"),
        ({name: shapes[name] for name in ("token", "x_reward")}, "topk_id"),
    ]:
        with pytest.raises(CorruptError, match=rf"^here: expected shapes .* of \['{named}'\]"):
            manifest.check_shapes(wrong, "here")
