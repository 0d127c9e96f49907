"""Verification finds every damage there is, one line each, and nothing in a sound cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path
from stillroom.cache.store import Cache

Damage = Callable[[Path, str], None]


def attempt(root: Path, part: str) -> Path:
    """Folder of a part's committed attempt."""
    return root / "scores" / part / Cache.open(root).commit_of(part).attempt


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file, in canonical form."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(jsonfile.dump(value))


def flip_a_byte(root: Path, part: str) -> None:
    path = attempt(root, part) / "shard.zarr.zip"
    data = bytearray(path.read_bytes())
    shard = Cache.open(root).shard(Cache.open(root).commit_of(part))
    data[shard.manifest.arrays["topk_id"].chunks[0].offset + 5] ^= 1
    path.write_bytes(data)


def flip_the_metadata(root: Path, part: str) -> None:
    path = attempt(root, part) / "shard.zarr.zip"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"node_type":"group"', b'"node_type":"grouq"'))


def truncate(root: Path, part: str) -> None:
    path = attempt(root, part) / "shard.zarr.zip"
    path.write_bytes(path.read_bytes()[:-100])


def swap_chunks(root: Path, part: str) -> None:
    folder = attempt(root, part)
    data = bytearray((folder / "shard.zarr.zip").read_bytes())
    arrays = json.loads((folder / "manifest.json").read_bytes())["arrays"]
    (a, n, _), (b, m, _) = arrays["rollout_id"]["chunks"][0], arrays["group"]["chunks"][0]
    assert n == m, "two chunks of one length"
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
    (folder / "shard.zarr.zip").write_bytes(data)


def swap_in_manifest(root: Path, part: str) -> None:
    def change(value: dict[str, Any]) -> None:
        arrays = value["arrays"]
        arrays["group"], arrays["rollout_id"] = arrays["rollout_id"], arrays["group"]

    rewrite(attempt(root, part) / "manifest.json", change)


def drop_manifest(root: Path, part: str) -> None:
    (attempt(root, part) / "manifest.json").unlink()


def drop_object(root: Path, part: str) -> None:
    (attempt(root, part) / "shard.zarr.zip").unlink()


def change_commit(root: Path, part: str) -> None:
    rewrite(root / commit_path(part, 0), lambda value: value.update(teacher_s=3.5))


def change_row_table(root: Path, part: str) -> None:
    rewrite(root / commit_path(part, 0), lambda value: value.update(row_table="AAAA"))


def break_commit(root: Path, part: str) -> None:
    (root / commit_path(part, 0)).write_bytes(b'{"part": ')


def change_rollouts(root: Path, part: str) -> None:
    path = root / "rollouts" / f"{part}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_rollouts(root: Path, part: str) -> None:
    (root / "rollouts" / f"{part}.parquet").unlink()


def other_student(root: Path, part: str) -> None:
    rewrite(root / "policies" / "000000.json", lambda value: value.update(fingerprint="0" * 32))


def second_commit(root: Path, part: str) -> None:
    first = root / commit_path(part, 0)
    value = json.loads(first.read_bytes()) | {"n": 1}
    first.with_name(f"{part}.1.json").write_bytes(jsonfile.dump(value))


def break_plan(root: Path, part: str) -> None:
    (root / "units").mkdir()
    (root / "units" / "v000000.json").write_bytes(b'{"units":[{}]}')


@pytest.mark.parametrize(
    ("damage", "objects"),
    [
        (flip_a_byte, {"shard.zarr.zip"}),
        (flip_the_metadata, {"shard.zarr.zip"}),
        (truncate, {"shard.zarr.zip"}),
        (swap_chunks, {"shard.zarr.zip"}),
        (swap_in_manifest, {"manifest.json"}),
        (drop_manifest, {"manifest.json"}),
        (drop_object, {"shard.zarr.zip"}),
        (change_commit, {"snapshots"}),
        (change_row_table, {"commits", "snapshots"}),
        (break_commit, {"commits", "snapshots"}),
        (change_rollouts, {"rollouts"}),
        (drop_rollouts, {"rollouts"}),
        (other_student, {"policies"}),
        (second_commit, {"commits"}),
        (break_plan, {"units"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_finds(
    damage: Damage, objects: set[str], damaged: Path, live_part: str, run: Any, tree: Any
) -> None:
    damage(damaged, live_part)
    before = tree(damaged)
    ran = run("verify", damaged)
    assert ran.status == 1
    assert ran.err == ""
    *lines, summary = [line for line in ran.out.splitlines() if not line.startswith("note: ")]
    assert lines
    for name in objects:
        assert any(name in line for line in lines), lines
    assert f"{len(lines)} finding" in summary
    assert tree(damaged) == before


def test_names_both_swapped_chunks(damaged: Path, live_part: str, run: Any) -> None:
    swap_chunks(damaged, live_part)
    problems = [f["problem"] for f in run("verify", damaged, "--json").json()["findings"]]
    assert any(p.startswith("rollout_id, chunk 0") for p in problems)
    assert any(p.startswith("group, chunk 0") for p in problems)


def test_goes_on_after_the_first_finding(damaged: Path, live_part: str, run: Any) -> None:
    flip_a_byte(damaged, live_part)
    other_student(damaged, live_part)
    objects = {
        f["object"].split("/")[0] for f in run("verify", damaged, "--json").json()["findings"]
    }
    assert objects == {"scores", "policies"}


def test_sound_cache(made_root: Path, run: Any, tree: Any) -> None:
    before = tree(made_root)
    ran = run("verify", made_root, "--json")
    assert ran.status == 0
    value = ran.json()
    assert value["findings"] == []
    assert value["checked"]["shards"] == 2
    assert value["checked"]["parts"] == 4
    assert [note["problem"].split(",")[0] for note in value["notes"]] == [
        "quarantined; not read",
        "an attempt that is not committed",
    ]
    assert tree(made_root) == before


def test_missing_cache_is_no_finding(tmp_path: Path, run: Any) -> None:
    ran = run("verify", tmp_path / "nothing")
    assert ran.status == 2
    assert ran.err.startswith("stillroom: error: ")
    assert ran.err.count("\n") == 1
