"""The reader in examples/independent_reader, which shares no code with us, reads what we write."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.example_shards import random_shard
from stillroom.cache.quarantine import put_quarantine
from stillroom.cache.schema import Arrays
from stillroom.cache.store import Cache
from tests.cache.fakes import commit_shard, make_identity, make_meta, same_bits

READER = Path(__file__).parents[2] / "examples" / "independent_reader" / "read_cache.py"
GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = ("zarr", "parquet")
PART = make_meta().name

ReadPart = Callable[[Path, str], Arrays]


@pytest.fixture(scope="module")
def read_part() -> ReadPart:
    """The reader's function, from the file as it stands."""
    found: ReadPart = runpy.run_path(str(READER))["read_part"]
    return found


def make_cache(root: Path, shard_format: str, *, mass: bool) -> Cache:
    """A cache with one part, of several chunks, groups of ids and row groups."""
    settings = {"topk": 6, "vocab_size": 900, "logit_width": 900, "extra": 2}
    identity = make_identity(shard_format=shard_format, extra_kind="student", **settings)
    cache = Cache.create(root, identity)
    positions = 9000 if shard_format == "parquet" else 2500
    arrays = random_shard(
        1, positions, 40, topk=6, vocab_size=900, extra=2, mass=mass, user_columns=True
    )
    commit_shard(cache, arrays)
    return cache


def expect_equal(found: Arrays, expected: Arrays) -> None:
    """Fail unless columns are the same, to the bit."""
    assert found.keys() == expected.keys()
    wrong = [name for name, array in expected.items() if not same_bits(found[name], array)]
    assert not wrong


@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_reads_what_the_cache_reads(
    shard_format: str, mass: bool, tmp_path: Path, read_part: ReadPart
) -> None:
    cache = make_cache(tmp_path, shard_format, mass=mass)
    manifest = cache.shard(cache.commit_of(PART)).manifest
    assert len(manifest.arrays["tail_logprob"].chunks) == 2
    if shard_format == "zarr":
        assert manifest.attributes["id_groups"] > 1
        assert manifest.attributes["entries_packed"] == mass
    expect_equal(read_part(tmp_path, PART), with_dtypes(cache.read(PART)))


def with_dtypes(arrays: Arrays) -> Arrays:
    """`Shard.rows` gives edges as int64, which it has summed from the commit."""
    edges = {name: a.astype(np.uint64) for name, a in arrays.items() if name.endswith("_start")}
    return arrays | edges


@pytest.mark.parametrize("shard_format", FORMATS)
def test_reads_the_golden_caches(shard_format: str, read_part: ReadPart) -> None:
    expected = json.loads((GOLDEN / f"v1-{shard_format}.json").read_bytes())
    for part, arrays in expected["arrays"].items():
        found = read_part(GOLDEN / f"v1-{shard_format}", part)
        encoded = {
            name: [f"{array.dtype}", [*array.shape], array.tobytes().hex()]
            for name, array in found.items()
        }
        assert encoded == arrays


@pytest.mark.parametrize("shard_format", FORMATS)
def test_takes_the_commit_behind_those_in_quarantine(
    shard_format: str, tmp_path: Path, read_part: ReadPart
) -> None:
    cache = make_cache(tmp_path, shard_format, mass=True)
    cache.quarantine(PART, "for a test", damaged=False)
    again = random_shard(2, 20, 3, topk=6, vocab_size=900, extra=2, mass=True)
    commit_shard(cache, again)
    expect_equal(read_part(tmp_path, PART), again)


def test_takes_the_first_commit_that_is_not_in_quarantine(
    tmp_path: Path, read_part: ReadPart
) -> None:
    """Marks of commits that are not there yet leave a gap, and do not count."""
    cache = make_cache(tmp_path, "zarr", mass=True)
    cache.quarantine(PART, "for a test", damaged=False)
    for n in (2, 3):
        put_quarantine(cache.storage, PART, n, "for a test", damaged=False)
    again = random_shard(2, 20, 3, topk=6, vocab_size=900, extra=2, mass=True)
    assert commit_shard(cache, again).n == cache.commits()[PART] == 1
    expect_equal(read_part(tmp_path, PART), again)


@pytest.mark.parametrize("shard_format", FORMATS)
@pytest.mark.parametrize(
    "pattern", ["commits/*/*", "scores/*/*/manifest.json", "scores/*/*/shard*"]
)
def test_refuses_damage(
    shard_format: str, pattern: str, tmp_path: Path, read_part: ReadPart
) -> None:
    make_cache(tmp_path, shard_format, mass=True)
    (path,) = tmp_path.glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_part(tmp_path, PART)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_prints_the_first_rollout(shard_format: str, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, shard_format, mass=False)
    arrays = cache.read(PART, 0, 1)
    command = [sys.executable, str(READER), str(tmp_path), PART]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *lines = done.stdout.splitlines()
    assert first == f"ids of the first rollout: {' '.join(map(str, arrays['token']))}"
    assert len(lines) == len(arrays["sampled_logprob"])
    sampled = arrays["token"][arrays["scored"] == 1][0]
    assert lines[0].startswith(f"{sampled}: {arrays['sampled_logprob'][0]:.3f} nats")
    assert str(arrays["topk_id"][0, :3]) in lines[0]


def test_needs_no_code_of_ours_and_fits_a_page() -> None:
    text = READER.read_text()
    assert "stillroom" not in text
    assert text.count("\n") < 80
