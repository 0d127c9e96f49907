"""docs/format.md says what the code does: its tables and lists of fields, row by row."""

from __future__ import annotations

import io
import json
import re
import typing
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.cache import canary, jsonfile, parquet_layout, snapshot_file
from stillroom.cache.claims import Claim
from stillroom.cache.commits import Commit
from stillroom.cache.errors import CorruptError
from stillroom.cache.id_map import MAX_IDS, IdMap
from stillroom.cache.identity import LEFT_OUT, Identity, MemberId, TeacherId
from stillroom.cache.manifest import ArrayEntry, Chunk, Manifest
from stillroom.cache.parquet_seal import NO_HASH, check_seal
from stillroom.cache.parquet_shard import ParquetFormat
from stillroom.cache.part import PartMeta, encode_part
from stillroom.cache.pins import Pin
from stillroom.cache.quarantine import put_quarantine
from stillroom.cache.schema import (
    COLUMNS,
    FINISH_REASONS,
    PART_SCHEMA,
    SOURCES,
    USER_PREFIX,
    Column,
)
from stillroom.cache.store import Cache
from stillroom.cache.testing_shard import random_stored
from stillroom.cache.tombstones import put_tombstone
from stillroom.cache.zarr_format import ZarrFormat
from stillroom.cache.zarr_id_groups import MAX_LOOKUP
from stillroom.cache.zarr_layout import (
    BLOCK_ROWS,
    CHUNK_ROWS,
    STORED_IDS,
    array_metadata,
    settings_of,
)
from stillroom.replay.cycle import Cycle, Unit
from stillroom.replay.policies import Policy
from stillroom.replay.prompts import Prompt
from stillroom.tools.object_names import KINDS, kind_of
from stillroom.train.drift import DriftMeter, put_drift
from tests.cache.fakes import FakeTeacher, make_identity, make_meta, random_rollouts
from tests.train.test_drift_sums import outcome

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"
SIZES = {"position": "P", "token": "N", "sequence": "S", "edge": "S + 1", "teacher_token": "Q"}
IDENTITY, MARKS = "`cache.json`: the identity", "Marks: quarantine, retired, removed"
EXAMPLES = {
    "<policy>": "000003",
    "<version>": "000003",
    "<part>": "v000003-0123456789abcdef",
    "<attempt>": "0" * 32,
    "<collector>": "1" * 32,
    "<random>": "2" * 32,
    "<id>": "3" * 32,
    "<fingerprint>": "4" * 32,
    "<n>": "10",
    "<step>": "00000500",
    "<name>": "round-1",
    "<run>": "run_1",
    "<class>": "engine-1.0-bfloat16-cuda",
}
Rows = dict[str, tuple[str, ...]]


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    parts = re.split(r"^## (.+)\n", DOCUMENT.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, parts[0])


def prose(heading: str) -> str:
    """A section on one line."""
    return " ".join(section(heading).split())


def rows(heading: str, first: str) -> list[list[str]]:
    """Cells of the table in a section whose header begins with `first`."""
    text = section(heading)
    tables = re.findall(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE)
    (lines,) = [table.splitlines() for table in tables if table.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def table(heading: str, first: str) -> Rows:
    """Rows of a table by the names in their first cell; a user's column left out."""
    named = [(name, tuple(rest)) for cell, *rest in rows(heading, first) for name in words(cell)]
    assert len(named) == len(dict(named)), f"a row of {heading!r} stands twice"
    return {name: rest for name, rest in named if not name.startswith(USER_PREFIX)}


def objects(heading: str) -> dict[str, dict[str, str]]:
    """Types by object and field, of a table that has these three columns first."""
    found: dict[str, dict[str, str]] = {}
    for name, field, kind, *_ in rows(heading, "object | field | type"):
        found.setdefault(name, {})[words(field)[0]] = kind
    return found


def words(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


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


def types_differ(document: Mapping[str, str], cls: type[Any]) -> list[str]:
    """One line for each field of which the document says another type than a dataclass."""
    hints = typing.get_type_hints(cls)
    code = {field.name: json_type(hints[field.name]) for field in fields(cls)}
    return differences(dict(sorted(document.items())), dict(sorted(known_version(code).items())))


def known_version(code: dict[str, str]) -> dict[str, str]:
    """The document names the only version that there is."""
    return code | ({"format_version": "1"} if "format_version" in code else {})


def json_type(kind: Any) -> str:
    """A field's type as the document writes it."""
    plain = {int: "integer", float: "number", str: "string", bool: "bool"}
    if kind in plain:
        return plain[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return f"list of {json_type(args[0])}s"
    if type(None) in args:
        return f"{json_type(args[0])} or null"
    return "object"


def shape_of(column: Column) -> str:
    """A column's shape as the document writes it."""
    return f"({SIZES[column.axis]}, {column.width})" if column.width else f"({SIZES[column.axis]},)"


def arrow_type(kind: pa.DataType) -> str:
    """A Parquet column's type as the document writes it."""
    if pa.types.is_list(kind):
        return f"list of {arrow_type(kind.value_type)}"
    return "float32" if kind == pa.float32() else str(kind)  # which Arrow prints as "float"


def arrow_types(schema: pa.Schema) -> dict[str, str]:
    """Types of all columns, and which may be null."""
    return {f.name: f"{arrow_type(f.type)}{' or null' if f.nullable else ''}" for f in schema}


def test_objects_are_those_that_a_cache_may_hold() -> None:
    found = set()
    for path in table("", "object"):
        named = re.sub(r"<\w+>", lambda match: EXAMPLES[match[0]], path)
        named += "model.safetensors" if path.endswith("/") else ""
        kinds = {kind_of(named, name) for name in ("shard.zarr.zip", "shard.parquet")} - {None}
        assert len(kinds) == 1, path
        found |= kinds
    assert found == {*KINDS, "scores"}
    assert {*table("", "name")} == {*EXAMPLES}


def test_sealed_json_and_its_bounds() -> None:
    text = prose("Hashes and JSON")
    data = jsonfile.dump_sealed({"b": 1e-5, "a": 'é😀"\n\x7f', "c": 1.5e16})
    body, seal = data[:-47], data[-47:]
    assert body == rb'{"a":"\u00e9\ud83d\ude00\"\n\u007f","b":1e-05,"c":1.5e+16'
    assert seal == f',"xxh3_128":"{jsonfile.digest(body)}"}}'.encode()
    assert f"{len(seal)} bytes" in text
    assert f"more than {jsonfile.MAX_BYTES >> 20} MiB (a commit: 32 MiB)" in text
    assert f"more than {jsonfile.MAX_DEPTH} levels, or 2^20 arrays" in text
    assert jsonfile.MAX_CONTAINERS == 2**20


def test_identity() -> None:
    listed = table(IDENTITY, "field")
    assert not types_differ({name: kind for name, (kind, _) in listed.items()}, Identity)
    assert not names_differ(words(listed["teacher"][1]), TeacherId)
    assert not names_differ(words(listed["ensemble"][1]), MemberId)
    left_out = {name for name, (_, what) in listed.items() if "; left out where " in what}
    assert left_out == {*LEFT_OUT}


def test_id_map() -> None:
    id_map = IdMap(
        teacher_id=np.array([1, 0], np.uint32),
        teacher_vocab_size=3,
        tokenizer="0" * 32,
        teacher_tokenizer="1" * 32,
    )
    value = jsonfile.load_sealed(id_map.to_json(), "")
    code = {name: json_type(type(entry)) for name, entry in value.items()}
    listed = table("A map of ids", "field")
    assert {name: kind for name, (kind, _) in listed.items()} == code
    assert f"at most 2^{MAX_IDS.bit_length() - 1} " in prose("A map of ids")


def test_part() -> None:
    kinds = {name: kind for name, (kind, _) in table("A part", "column").items()}
    assert not differences(kinds, arrow_types(PART_SCHEMA))
    metadata = {name: kind for name, (kind, _) in table("A part", "field").items()}
    assert not types_differ(metadata, PartMeta)


def test_seal_of_a_part() -> None:
    data = encode_part(random_rollouts(0, 3), make_meta())
    start = data.index(b"stillroom_hash\x18\x20") + 16
    unsealed = data[:start] + NO_HASH + data[start + 32 :]
    assert jsonfile.digest(unsealed).encode() == data[start : start + 32]
    with pytest.raises(CorruptError):
        check_seal(unsealed, "", "")


@pytest.mark.parametrize(
    ("column", "codes"), [("finish_reason", FINISH_REASONS), ("source", SOURCES)]
)
def test_codes_are_listed_in_their_order(column: str, codes: tuple[str, ...]) -> None:
    assert tuple(words(table("A part", "column")[column][1])) == codes


def test_shard() -> None:
    code = {c.name: (shape_of(c), c.dtype, c.unit, c.doc) for c in COLUMNS}
    assert not differences(table("A shard", "array"), code)


def test_attributes() -> None:
    listed = table("A shard", "attribute")
    zarr, parquet = (random_stored(form).encoded for form in (ZarrFormat(), ParquetFormat()))
    assert {*listed} == {*zarr.attributes}
    zarr_only = {name for name, (_, what) in listed.items() if what.startswith("Zarr only")}
    assert {*listed} - zarr_only == {*parquet.attributes}
    code = known_version({k: json_type(type(value)) for k, value in zarr.attributes.items()})
    assert not differences({name: kind for name, (kind, _) in listed.items()}, code)


def test_zarr_arrays() -> None:
    kinds = {name: dtype for name, (_, dtype, _) in table("A Zarr shard", "array | shape").items()}
    assert not differences(kinds, STORED_IDS)
    stored = random_stored(ZarrFormat()).encoded.arrays
    assert {*stored} - {*STORED_IDS} == {c.name for c in COLUMNS if c.name != "topk_id"} | {
        "x_reward",
        "x_advantage",
    }
    listed = rows("A Zarr shard", "array | PCodec's settings")
    settings = {name: json.loads(words(cell)[0]) for names, cell in listed for name in words(names)}
    assert {name: settings.get(name, {}) for name in stored} == {n: settings_of(n) for n in stored}
    assert settings.keys() <= stored.keys()


def test_zarr_metadata_and_members() -> None:
    text = section("A Zarr shard")
    (example,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    assert json.loads(example) == array_metadata("topk_code", "uint32", (3000, 4))
    sizes = (
        f"chunks of {CHUNK_ROWS:,} rows",
        f"{BLOCK_ROWS // CHUNK_ROWS} chunks ({BLOCK_ROWS:,} rows)",
    )
    assert all(size in prose("A Zarr shard") for size in sizes)
    assert MAX_LOOKUP == 2**23
    encoded = random_stored(ZarrFormat())
    with zipfile.ZipFile(io.BytesIO(encoded.encoded.data)) as archive:
        members, group = archive.infolist(), archive.read("zarr.json")
    names = ["zarr.json"]
    for name, entry in sorted(encoded.encoded.arrays.items()):
        block = f"{name}/c/0" + "/0" * (len(entry.shape) - 1)
        names += [block, f"{name}/zarr.json"] if entry.shape[0] else [f"{name}/zarr.json"]
    assert [member.filename for member in members] == names
    assert {(m.compress_type, m.external_attr, m.create_system, m.extra) for m in members} == {
        (0, 0x01800000, 3, b"")
    }
    assert {m.date_time for m in members} == {(1980, 1, 1, 0, 0, 0)}
    attributes = jsonfile.dump(encoded.encoded.attributes).decode()
    assert group.decode() == f'{{"attributes":{attributes},"node_type":"group","zarr_format":3}}'


def test_parquet_columns() -> None:
    axes: dict[str, Any] = {"x_a": "sequence", "x_b": "position"}
    code = {}
    for field in parquet_layout.fields_of(axes, extra=True):
        encoding = "ids" if field.is_id else "names"
        if not (field.names or field.is_id):
            encoding = encoding_name(parquet_layout.plain_encoding(field))
        code[field.name] = (str(field.depth), parquet_type(field), encoding)
    listed = {
        {"`x_...` per sequence, by name": "x_a", "`x_...` per position, by name": "x_b"}.get(
            name, name.strip("`")
        ): tuple(rest)
        for name, *rest in rows("A Parquet shard", "column")
    }
    assert not differences(listed, code)


def encoding_name(number: int) -> str:
    """As in Parquet's specification."""
    names = ("PLAIN", "BYTE_STREAM_SPLIT")
    return {getattr(parquet_layout, name): name for name in names}[number]


def parquet_type(field: parquet_layout.Field) -> str:
    """A column's physical type and its annotation, by their names in Parquet's specification."""
    kinds = {getattr(parquet_layout, n): n for n in ("INT32", "INT64", "FLOAT", "BYTE_ARRAY")}
    notes = {getattr(parquet_layout, n): n for n in ("UTF8", "UINT_32", "UINT_64")}
    kind = kinds.get(field.physical, "BOOLEAN")
    return kind if field.converted is None else f"{kind}, {notes[field.converted]}"


def test_parquet_row_groups() -> None:
    text = prose("A Parquet shard")
    layout = parquet_layout
    assert f"min({layout.GROUP_POSITIONS}, 2^20 div K) positions" in text
    assert (layout.GROUP_ENTRIES, layout.GROUP_TOKENS, layout.PAGES) == (2**20, 2**18, 2)
    assert words(text)[0] == layout.OBJECT_NAME


def test_manifest() -> None:
    listed = table("The manifest", "field")
    assert not types_differ({name: kind for name, (kind, _) in listed.items()}, Manifest)
    assert not names_differ(words(listed["arrays"][1]), ArrayEntry)
    (chunk,) = re.findall(r"list of \[([^]]+)\]", prose("The manifest"))
    assert not names_differ(chunk.split(", "), Chunk)


def test_commit() -> None:
    kinds = {name: kind for name, (kind, _) in table("A commit", "field").items()}
    assert not types_differ(kinds, Commit)


def test_marks_plans_and_drift(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path, make_identity())
    part = make_meta().name
    cache.retire(part, "old")
    put_quarantine(cache.storage, part, 0, "damaged", damaged=True)
    put_tombstone(cache.storage, part, 0, "0" * 32)
    for folder, (listed, _) in table(MARKS, "object").items():
        (entry,) = cache.storage.list(folder)
        assert {*words(listed)} == {*jsonfile.load_sealed(cache.storage.get(entry.path), "")}

    meter = DriftMeter()
    meter.add(outcome(np.zeros(1), np.zeros(1)))
    put_drift(cache.storage, "run", 1, meter.take(0))
    drift = jsonfile.load_sealed(cache.storage.get("drift/run/00000001.json"), "")
    code = {name: json_type(type(value)) for name, value in drift.items()}
    assert objects("Plans, policies, drift")["drift"] == code
    (cell,) = [c for _, f, _, c in rows("Plans, policies, drift", "object") if f == "`by_policy`"]
    assert {*words(cell)} == {*drift["by_policy"]["0"]}


def test_plans_and_policies() -> None:
    listed = objects("Plans, policies, drift")
    prompt = Prompt(np.array([1, 2], np.uint32), 0, None)
    unit = Unit(policy_version=0, source="student", prompt_ids=(0,), sampler={}, seed=0)
    plan = jsonfile.load_sealed(Cycle((unit,), (prompt,)).to_json(), "")
    assert {*listed["plan"]} == {*plan}
    assert {*listed["prompts"]} == {*plan["prompts"]}
    assert not types_differ(listed["unit"], Unit)
    assert not types_differ(listed["policy"], Policy)


def test_pins_and_claims() -> None:
    listed = objects("Pins and claims")
    assert not types_differ(listed["pin"], Pin)
    assert not types_differ(listed["claim"], Claim)


def test_snapshot() -> None:
    kinds = {name: kind for name, (kind, _) in table("A snapshot", "column").items()}
    assert not differences(kinds, arrow_types(snapshot_file.SCHEMA))


def test_canary(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path, make_identity())
    canary.check_canary(cache, FakeTeacher())
    (entry,) = cache.storage.list("canary")
    text = prose("The canary")
    assert {*jsonfile.load_sealed(cache.storage.get(entry.path), "")} <= {*words(text)}
    *most, last = map(str, canary.LENGTHS)
    assert f"{', '.join(most)} and {last} tokens" in text
    assert f"min({canary.KEPT}, K)" in text


def test_differences_name_the_row() -> None:
    (found,) = differences({"a": ("1",), "b": ("2",)}, {"a": ("1",), "b": ("3",)})
    assert found == "row `b`: the document says ('2',); the code says ('3',)"
    assert "row `c`" in differences({}, {"c": ("1",)})[0]
    assert "order" in differences({"a": 1, "b": 2}, {"b": 2, "a": 1})[0]
    assert len(names_differ(["offset", "offset", "size"], Chunk)) == 4
    assert "row `length`" in types_differ({"offset": "integer", "hash": "string"}, Chunk)[0]
