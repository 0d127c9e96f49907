"""Conversion between shard formats: nothing is lost, and an interrupted one goes on."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, CorruptError, MissingError
from stillroom.cache.store import Cache
from stillroom.tools.convert import convert


def scores(root: Path) -> dict[str, dict[str, bytes]]:
    cache = Cache.open(root)
    return {
        part: {name: array.tobytes() for name, array in cache.read(part).items()}
        for part in cache.commits()
    }


def test_there_and_back_is_the_same(made_root: Path, tmp_path: Path, run: Any, tree: Any) -> None:
    before = tree(made_root)
    ran = run("convert", made_root, tmp_path / "there", "--shard-format", "parquet")
    assert ran.status == 0, ran.err
    assert "2 shards encoded as parquet and compared bit for bit" in ran.out
    again = run("convert", made_root, tmp_path / "there", "--shard-format", "parquet", "--json")
    assert (again.json()["shards"], again.json()["already"]) == ([], 2)
    assert tree(made_root) == before
    assert Cache.open(tmp_path / "there").identity.shard_format == "parquet"
    assert scores(tmp_path / "there") == scores(made_root)
    back = convert(Cache.open(tmp_path / "there"), str(tmp_path / "back"), "zarr")
    assert len(back.shards) == 2
    assert scores(tmp_path / "back") == scores(made_root)


def test_everything_but_scores_is_copied_byte_for_byte(
    made_root: Path, tmp_path: Path, tree: Any
) -> None:
    convert(Cache.open(made_root), str(tmp_path / "there"), "parquet")
    kept = ("rollouts", "policies", "retired")
    before, after = tree(made_root), tree(tmp_path / "there")
    same = {name: data for name, data in before.items() if name.split("/")[0] in kept}
    assert same
    assert {name: data for name, data in after.items() if name.split("/")[0] in kept} == same
    assert Cache.open(tmp_path / "there").retired() == Cache.open(made_root).retired()


def test_a_second_run_does_what_is_left(made_root: Path, tmp_path: Path) -> None:
    source, root = Cache.open(made_root), tmp_path / "there"
    convert(source, str(root), "parquet")
    (commit,) = [
        p for p in root.glob("commits/*/*") if p.name.startswith("v000000-0000000000000001")
    ]
    commit.unlink()
    again = convert(source, str(root), "parquet")
    assert (again.shards, again.already, again.copied) == (["v000000-0000000000000001"], 1, 0)
    assert scores(root) == scores(made_root)


def test_a_damaged_source_is_named_and_the_rest_stays(damaged: Path, tmp_path: Path) -> None:
    source = Cache.open(damaged)
    shard = source.shard(source.commit_of("v000000-0000000000000002"))
    data = bytearray((damaged / shard.path).read_bytes())
    data[shard.manifest.arrays["topk_code"].chunks[0].offset + 9] ^= 1
    (damaged / shard.path).write_bytes(data)
    with pytest.raises(CorruptError, match="v000000-0000000000000002"):
        convert(source, str(tmp_path / "there"), "parquet")
    assert list(Cache.open(tmp_path / "there").commits()) == ["v000000-0000000000000001"]


def test_a_format_that_does_not_exist_is_refused(made_root: Path, tmp_path: Path, run: Any) -> None:
    ran = run("convert", made_root, tmp_path / "there", "--shard-format", "csv")
    assert (ran.status, ran.out) == (2, "")
    assert "shard_format: expected one of ('zarr', 'parquet'); got 'csv'" in ran.err
    assert not (tmp_path / "there").exists()


def test_source_and_destination_differ(made_root: Path) -> None:
    with pytest.raises(ConfigError, match="another root"):
        convert(Cache.open(made_root), str(made_root), "zarr")
    with pytest.raises(MissingError, match=r"no cache\.json"):
        Cache.open(made_root.parent)
