"""Caches of format version 1, made once by tests/golden/make_golden.py, are read for ever: every
number, every row, every small file."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.commits import attempt_path, commit_path
from stillroom.cache.errors import MissingError
from stillroom.cache.manifest import Manifest
from stillroom.cache.pins import list_pins
from stillroom.cache.schema import Arrays
from stillroom.cache.shard import Shard
from stillroom.cache.shard_format import shard_format
from stillroom.cache.store import Cache
from stillroom.replay.cycle import load_cycle
from stillroom.replay.policies import read_policy
from stillroom.tools.verify import verify
from tests.cache.fakes import same_bits

FOLDER = Path(__file__).parents[1] / "golden"
OWN_ATTRIBUTES = {"entries_packed", "id_groups", "id_group_width"}
"""What a Zarr shard adds to the attributes that it is given."""
OTHER_BYTES = """
The arrays of a golden shard are encoded into other bytes than when version 1 was made (with {}).
Shards that exist are read as before, or the other tests of this file would fail too. If a new
release of PCodec or Zstandard is the reason, nothing is broken, but equal arrays no longer give
equal bytes across releases: say so in docs/format.md and CHANGELOG.md, and compare lengths here
from then on. If it is a change of ours, it is a change of the format: take it back, or raise the
version. Never make the golden caches again.
"""


@dataclass(frozen=True)
class Golden:
    """One of the caches, in a copy that nothing can harm."""

    cache: Cache
    expected: dict[str, Any]

    def arrays(self, part: str) -> Arrays:
        """What was encoded, not read back from the cache."""
        return {
            name: np.frombuffer(bytes.fromhex(data), np.dtype(dtype).newbyteorder("<"))
            .astype(dtype)
            .reshape(shape)
            for name, (dtype, shape, data) in self.expected["arrays"][part].items()
        }

    def shards(self) -> list[Shard]:
        """Shards of all parts that have one."""
        return [self.cache.shard(self.cache.commit_of(part)) for part in self.expected["arrays"]]


@pytest.fixture(scope="module", params=["v1-zarr", "v1-parquet"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Each of the caches."""
    root = tmp_path_factory.mktemp("golden") / request.param
    shutil.copytree(FOLDER / request.param, root)
    expected = json.loads((FOLDER / f"{request.param}.json").read_bytes())
    return Golden(Cache.open(root), expected)


def test_identity_and_commits_are_the_same(golden: Golden) -> None:
    cache, expected = golden.cache, golden.expected
    assert cache.identity.digest() == expected["identity"]
    assert cache.identity.to_json() == cache.storage.get("cache.json")
    commits = [cache.commit_of(part) for part in expected["commits"]]
    assert {c.part: [c.n, c.digest()] for c in commits} == expected["commits"]
    assert sorted(n for n, _ in expected["commits"].values()) == [0, 1]
    assert cache.retired() == {expected["retired"]}
    assert cache.unscored() == []


def test_every_number_is_the_one_that_was_written(golden: Golden) -> None:
    for shard in golden.shards():
        arrays = golden.arrays(shard.commit.part)
        assert {*shard.columns} == arrays.keys()
        for name, array in arrays.items():
            assert same_bits(shard.read(name), array), f"{shard.path}, {name}"
        whole = golden.cache.read(shard.commit.part)
        for name, array in arrays.items():
            assert np.array_equal(whole[name], array, equal_nan=array.dtype.kind == "f")


def test_every_rollout_is_the_one_that_was_written(golden: Golden) -> None:
    for part, rows in golden.expected["rollouts"].items():
        table, meta, rollouts_hash = golden.cache.read_part(part)
        assert json.dumps(table.to_pylist(), sort_keys=True) == json.dumps(rows, sort_keys=True)
        assert meta.name == part
        assert golden.cache.commit_of(part).rollouts_hash == rollouts_hash


def test_tokens_are_those_of_the_rollouts(golden: Golden) -> None:
    for part, rows in golden.expected["rollouts"].items():
        tokens = [token for row in rows for token in row["prompt"] + row["completion"]]
        assert golden.cache.read(part)["token"].tolist() == tokens


def test_the_caches_hold_what_version_1_can_hold(golden: Golden) -> None:
    for part in golden.expected["arrays"]:
        arrays = golden.arrays(part)
        assert (arrays["topk_count"] < golden.cache.identity.topk).any()
        assert (arrays["scored"] == 0).sum() > arrays["prompt_length"].sum()
        assert len(arrays["teacher_prompt"])
        assert np.isnan(arrays["behaviour_logprob"]).any()
        assert np.isfinite(arrays["extra_behaviour_logprob"]).any()
        assert np.isfinite(arrays["x_advantage"]).any()
        assert {"x_reward", "x_advantage"} <= arrays.keys()


def test_the_snapshot_opens(golden: Golden) -> None:
    cache, expected = golden.cache, golden.expected
    snapshot = cache.open_snapshot(expected["snapshot"])
    assert snapshot.id == expected["snapshot"]
    assert {c.part: [c.n, c.digest()] for c in snapshot.commits} == expected["commits"]
    assert cache.snapshot().id == snapshot.id


def test_the_collected_part_is_refused(golden: Golden) -> None:
    with pytest.raises(MissingError, match=golden.expected["retired"]):
        golden.cache.snapshot([golden.expected["retired"]])


def test_small_files_are_read(golden: Golden) -> None:
    storage = golden.cache.storage
    (pin,) = list_pins(storage)
    assert (pin.run, pin.snapshots) == ("golden", [golden.expected["snapshot"]])
    assert read_policy(storage, 0).path == "/golden/student"
    rows = golden.expected["rollouts"]
    for number, part in enumerate(rows):
        cycle = load_cycle(golden.cache, f"round-{number}")
        assert part.endswith(cycle.units[0].id)
        prompts = {row["prompt_id"]: row["prompt"] for row in rows[part]}
        assert {p.id: p.token.tolist() for p in cycle.prompts} == prompts


def test_verification_finds_nothing(golden: Golden) -> None:
    report = verify(golden.cache, deep=True)
    assert report.findings == []


def test_manifests_and_commits_have_the_bytes_of_today(golden: Golden) -> None:
    storage = golden.cache.storage
    for shard in golden.shards():
        path = f"{attempt_path(shard.commit.part, shard.commit.attempt)}/manifest.json"
        data = storage.get(path)
        assert Manifest.from_json(data, path).to_json() == data
        assert storage.get(commit_path(shard.commit.part, shard.commit.n)) == shard.commit.to_json()


def test_equal_arrays_give_equal_bytes(golden: Golden) -> None:
    form = shard_format(golden.cache.identity.shard_format)
    for shard in golden.shards():
        attributes = shard.manifest.attributes
        given = {key: attributes[key] for key in attributes.keys() - OWN_ATTRIBUTES}
        encoded = form.encode(golden.arrays(shard.commit.part), given)
        same = encoded.data == golden.cache.storage.get(shard.path)
        assert same, OTHER_BYTES.format(golden.expected["made_with"])
        assert encoded.arrays == shard.manifest.arrays
        assert encoded.attributes == attributes


def test_git_leaves_the_bytes_alone() -> None:
    lines = (FOLDER.parents[1] / ".gitattributes").read_text().splitlines()
    assert "tests/golden/** -text" in lines
