"""docs/format.md says what the code does: its tables and lists of fields, row by row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stillroom.cache.commits import Commit
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from stillroom.cache.part import PartMeta
from stillroom.cache.schema import (
    COLUMNS,
    FINISH_REASONS,
    PART_SCHEMA,
    SOURCES,
    USER_PREFIX,
    Column,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"
SIZES = {"position": "P", "token": "N", "sequence": "S", "edge": "S + 1", "teacher_token": "Q"}
Rows = dict[str, tuple[str, ...]]


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    parts = re.split(r"^## (.+)\n", DOCUMENT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def table(heading: str) -> Rows:
    """Rows of a section's table by the names in their first cell; a user's column left out."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    named = [(name, tuple(rest)) for first, *rest in cells for name in code_words(first)]
    assert len(named) == len(dict(named)), f"a row of {heading!r} stands twice"
    return {name: rest for name, rest in named if not name.startswith(USER_PREFIX)}


def code_words(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def paragraph(heading: str, start: str, end: str) -> str:
    """A section's text from one phrase to another, both excluded."""
    return section(heading).partition(start)[2].partition(end)[0]


def differences(document: Mapping[str, object], code: Mapping[str, object]) -> list[str]:
    """One line for each row in which they differ, and one if only their order does."""
    found = [
        f"row `{name}`: the document says {document.get(name, 'nothing')}; "
        f"the code says {code.get(name, 'nothing')}"
        for name in dict.fromkeys([*code, *document])
        if document.get(name) != code.get(name)
    ]
    order = [f"order: the document has {list(document)}; the code has {list(code)}"]
    return found or (order if list(document) != list(code) else [])


def names_differ(document: Iterable[str], cls: type[Any]) -> list[str]:
    """One line for each field that only the document or only a dataclass has, in any order."""
    listed, known = list(document), {field.name for field in fields(cls)}
    return (
        [f"`{name}` is listed; {cls.__name__} has no such field" for name in {*listed} - known]
        + [f"`{name}` of {cls.__name__} is not listed" for name in known - {*listed}]
        + [f"`{name}` is listed twice" for name in {*listed} if listed.count(name) > 1]
    )


def shape_of(column: Column) -> str:
    """A column's shape as the document writes it."""
    return f"({SIZES[column.axis]}, {column.width})" if column.width else f"({SIZES[column.axis]},)"


def type_of(field: pa.Field) -> str:
    """A Parquet column's type as the document writes it."""
    is_list = pa.types.is_list(field.type)
    value = field.type.value_type if is_list else field.type
    name = "float32" if value == pa.float32() else str(value)  # which Arrow prints as "float"
    return f"{'list of ' if is_list else ''}{name}{' or null' if field.nullable else ''}"


def test_identity() -> None:
    rows = table("`cache.json`: the identity")
    assert not names_differ(rows, Identity)
    assert not names_differ(code_words(rows["teacher"][1]), TeacherId)


def test_shard() -> None:
    code = {c.name: (shape_of(c), c.dtype, c.unit, c.doc) for c in COLUMNS}
    assert not differences(table("A shard"), code)


def test_part() -> None:
    rows = {name: kind for name, (kind, _) in table("A part").items()}
    assert not differences(rows, {field.name: type_of(field) for field in PART_SCHEMA})
    assert not names_differ(code_words(paragraph("A part", "JSON with", "(")), PartMeta)


@pytest.mark.parametrize(
    ("column", "codes"), [("finish_reason", FINISH_REASONS), ("source", SOURCES)]
)
def test_codes_are_listed_in_their_order(column: str, codes: tuple[str, ...]) -> None:
    assert tuple(code_words(table("A part")[column][1])) == codes


def test_commit() -> None:
    assert not names_differ(code_words(section("A commit").partition("\n\n")[0]), Commit)


def test_manifest() -> None:
    of_manifest, _, of_array = section("The manifest").partition(": for each name")
    listed, _, of_chunk = of_array.partition("a list of [")
    assert not names_differ(code_words(of_manifest), Manifest)
    assert not names_differ(code_words(listed), ArrayEntry)
    assert not names_differ(of_chunk.partition("]")[0].split(", "), Chunk)


def test_differences_name_the_row() -> None:
    (found,) = differences({"a": ("1",), "b": ("2",)}, {"a": ("1",), "b": ("3",)})
    assert found == "row `b`: the document says ('2',); the code says ('3',)"
    assert "row `c`" in differences({}, {"c": ("1",)})[0]
    assert "order" in differences({"a": 1, "b": 2}, {"b": 2, "a": 1})[0]
    assert len(names_differ(["offset", "offset", "size"], Chunk)) == 4
