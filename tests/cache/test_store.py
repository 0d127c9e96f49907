"""A cache as a whole: what it makes, what it lists, and that a refused shard leaves nothing."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache import Cache as Exported
from stillroom.cache import jsonfile
from stillroom.cache.canary import read_canary
from stillroom.cache.commits import Commit, attempt_path, commit_path
from stillroom.cache.errors import (
    CorruptError,
    MismatchError,
    MissingError,
    ShapeError,
    StorageError,
)
from stillroom.cache.identity import SHARD_FORMATS
from stillroom.cache.manifest import Manifest
from stillroom.cache.pins import list_pins
from stillroom.cache.quarantine import damaged_commits, quarantine_path
from stillroom.cache.score import score
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import OBJECT_NAME
from tests.cache.fakes import (
    SCORED_BY,
    FakeTeacher,
    commit_shard,
    make_identity,
    make_meta,
    random_arrays,
    random_rollouts,
    same_bits,
)


def test_a_cache_is_probed_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    monkeypatch.setattr(Storage, "probe", lambda storage: probed.append(storage.root))
    root = tmp_path / "new" / "root"
    Cache.create(root, make_identity())
    assert probed == [str(root)]
    Cache.create(root, make_identity())
    Cache.open(root)
    assert probed == [str(root)]


def test_a_storage_without_links_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match="s3://"):
        Cache.create(tmp_path, make_identity())
    monkeypatch.undo()
    with pytest.raises(MissingError):
        Cache.open(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_opening_reads_only(tmp_path: Path) -> None:
    Cache.create(tmp_path, make_identity())
    before = sorted(tmp_path.rglob("*"))
    cache = Exported.open(tmp_path)
    assert cache.parts() == cache.unscored() == []
    assert cache.commits() == {}
    assert cache.retired() == set()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_part_is_unscored_until_it_is_scored_or_retired(cache: Cache) -> None:
    names = [make_meta(number).name for number in range(3)]
    for number in range(3):
        cache.add_part(random_rollouts(number, 4), make_meta(number))
    score_one = random_arrays(0, 12, 4)
    commit_shard(cache, score_one, 0)
    cache.retire(names[2], "too old")
    assert cache.parts() == names
    assert cache.unscored() == [names[1]]
    assert cache.commits() == {names[0]: 0}


def test_a_part_is_read_by_its_name(cache: Cache) -> None:
    arrays, name = random_arrays(0, 30, 5), make_meta().name
    commit_shard(cache, arrays)
    assert same_bits(cache.read(name)["token"], arrays["token"])
    assert same_bits(cache.read(name, 1, 3)["group"], arrays["group"][1:3])
    assert same_bits(cache.read(name, 4)["group"], arrays["group"][4:])


def test_a_quarantined_part_is_unscored(cache: Cache) -> None:
    name = make_meta().name
    cache.add_part(random_rollouts(0, 4), make_meta())
    assert not cache.is_scored(name)
    with pytest.raises(MissingError, match=name):
        cache.quarantine(name, "no reason", damaged=True)
    for n in range(2):
        commit = commit_shard(cache, random_arrays(0, 12, 4))
        assert commit.n == n
        assert cache.is_scored(name)
        assert cache.unscored() == []
        cache.quarantine(name, "bad sector", damaged=True)
        assert not cache.is_scored(name)
        assert cache.unscored() == [name]
    files = [entry.path for entry in cache.storage.list("quarantine")]
    assert files == [f"quarantine/{name}.{n}.json" for n in range(2)]
    assert jsonfile.load_sealed(cache.storage.get(files[0]), "x")["reason"] == "bad sector"


def test_a_part_under_another_name_is_refused(cache: Cache, root: Path) -> None:
    cache.add_part(random_rollouts(0, 4), make_meta(0))
    first, second = (root / f"rollouts/{make_meta(i).name}.parquet" for i in range(2))
    first.rename(second)
    with pytest.raises(MismatchError, match=re.escape(str(second))):
        cache.read_part(make_meta(1).name)


def test_what_is_not_there_is_missing(cache: Cache) -> None:
    name = make_meta(1).name
    with pytest.raises(MissingError, match=name):
        cache.read_part(name)
    with pytest.raises(MissingError, match=f"^part {name}: expected a commit"):
        cache.commit_of(name)


def test_a_commit_is_found_without_a_listing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = [commit_shard(cache, random_arrays(0, 20, 3))]
    cache.quarantine(make_meta().name, "bad sector", damaged=True)
    commits.append(commit_shard(cache, random_arrays(0, 20, 3)))
    monkeypatch.delattr(Storage, "list")
    assert cache.commit_of(make_meta().name) == commits[1]


def test_files_that_are_no_parts_are_not_listed(cache: Cache, root: Path) -> None:
    cache.add_part(random_rollouts(0, 2), make_meta(0))
    for name in ("notes.parquet", f"{make_meta(1).name}.txt", f".{make_meta(1).name}.parquet"):
        (root / "rollouts" / name).write_bytes(b"x")
    assert cache.parts() == [make_meta(0).name]


def test_a_shard_that_is_not_whole_leaves_nothing(cache: Cache) -> None:
    arrays = random_arrays(0, 12, 4)
    del arrays["tail_logprob"]
    with pytest.raises(ShapeError, match="tail_logprob"):
        cache.add_shard(make_meta(), "0" * 32, arrays, SCORED_BY)
    assert cache.storage.list("scores") == cache.storage.list("commits") == []


def test_the_manifest_describes_the_object(cache: Cache, root: Path) -> None:
    arrays = random_arrays(0, 12, 4) | {
        "x_reward": np.ones(4, np.float32),
        "x_weight": np.ones(12, np.float32),
    }
    meta = make_meta(3, policy=7)
    commit = cache.add_shard(meta, "9" * 32, arrays, SCORED_BY)
    assert commit is not None
    folder = root / "scores" / meta.name / commit.attempt
    data, manifest_bytes = (
        (folder / OBJECT_NAME).read_bytes(),
        (folder / "manifest.json").read_bytes(),
    )
    manifest = Manifest.from_json(manifest_bytes, "here")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", OBJECT_NAME]
    assert (manifest.part, manifest.attempt) == (meta.name, commit.attempt)
    assert manifest.identity == commit.identity == cache.identity.digest()
    assert (manifest.size, manifest.hash) == (len(data), jsonfile.digest(data))
    assert commit.manifest_hash == jsonfile.digest(manifest_bytes)
    assert (commit.rollouts_hash, commit.teacher_s) == ("9" * 32, SCORED_BY.teacher_s)
    assert manifest.attributes["policy_version"] == commit.policy_version == 7
    assert manifest.attributes["sampler"] == meta.sampler
    assert manifest.attributes["user_axes"] == {"x_reward": "sequence", "x_weight": "position"}
    with zipfile.ZipFile(folder / OBJECT_NAME) as archive:
        assert archive.testzip() is None


def test_a_shard_of_another_identity_is_refused(cache: Cache, tmp_path: Path) -> None:
    other = Cache.create(tmp_path / "other", make_identity(temperature=2.0))
    other.add_part(random_rollouts(0, 4), make_meta())
    score(other, FakeTeacher())
    with pytest.raises(MismatchError, match="expected"):
        cache.shard(other.commit_of(make_meta().name))


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_the_metadata_of_a_large_shard_costs_little(tmp_path: Path, shard_format: str) -> None:
    cache = Cache.create(tmp_path, make_identity(shard_format=shard_format))
    positions = 100_000
    commit = commit_shard(cache, random_arrays(0, positions, 200))
    chunks = cache.shard(commit).manifest.arrays.values()
    payload = sum(chunk.length for entry in chunks for chunk in entry.chunks)
    assert (commit.stored_bytes - payload) / positions < 1


READERS: dict[str, Callable[[Cache, Commit], object]] = {
    "identity": lambda cache, _: Cache.open(cache.storage.root),
    "commit": lambda cache, _: cache.snapshot(),
    "manifest": lambda cache, commit: cache.shard(commit),
    "quarantine": lambda cache, _: damaged_commits(cache.storage),
    "pin": lambda cache, _: list_pins(cache.storage),
    "canary": lambda cache, _: read_canary(cache, "canary/x.json"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_small_file_of_a_tebibyte_is_refused_and_not_read(tmp_path: Path, kind: str) -> None:
    cache = Cache.create(tmp_path, make_identity())
    commit = commit_shard(cache, random_arrays(0, 20, 3))
    path = {
        "identity": "cache.json",
        "commit": commit_path(commit.part, 0),
        "manifest": f"{attempt_path(commit.part, commit.attempt)}/manifest.json",
        "quarantine": quarantine_path(commit.part, 0),
        "pin": "pins/run.json",
        "canary": "canary/x.json",
    }[kind]
    cache.storage.put_new(path, b"{}")
    os.truncate(tmp_path / path, 1 << 40)
    with pytest.raises(
        CorruptError, match=rf"{re.escape(path)}: .*at most \d+ bytes; got {1 << 40}"
    ):
        READERS[kind](cache, commit)
