"""Every shard format keeps the contract of `cache/testing.py`; other bytes are refused."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.cache import jsonfile, testing, testing_damage
from stillroom.cache.errors import CorruptError
from stillroom.cache.identity import SHARD_FORMATS
from stillroom.cache.shard_format import ShardFormat, shard_format, verify

ROOT = Path(__file__).resolve().parents[2]
BOUNDED_BYTES = 1 << 30
"""Address space for reading hostile shards of some kB, beyond what imports took."""


@pytest.mark.parametrize("name", SHARD_FORMATS)
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_contract(name: str, check: Callable[[ShardFormat], None]) -> None:
    check(shard_format(name))


def test_every_check_is_in_the_contract() -> None:
    written = [
        value
        for module in (testing, testing_damage)
        for name, value in vars(module).items()
        if name.startswith("check_") and value.__module__ == module.__name__
    ]
    assert len(written) > 8
    assert set(written) == set(testing.CHECKS)


def test_formats_have_objects_of_their_own() -> None:
    names = {shard_format(name).object_name for name in SHARD_FORMATS}
    assert names == {"shard.zarr.zip", "shard.parquet"}


def test_bytes_of_another_hash_are_refused() -> None:
    verify(b"abc", jsonfile.digest(b"abc"), "here")
    for other in (b"", b"abd", b"abcd"):
        with pytest.raises(CorruptError, match=rf"^here: .*\({len(other)} bytes\)"):
            verify(other, jsonfile.digest(b"abc"), "here")


@pytest.mark.dist
@pytest.mark.parametrize("name", SHARD_FORMATS)
def test_hostile_shards_take_little_memory(name: str) -> None:
    """In a process of its own, whose address space is bounded once a shard was read."""
    command = [sys.executable, "-m", "tests.cache.test_shard_format", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "kept\n"), done.stderr


def read_hostile_shards(name: str) -> None:
    """Run the checks of hostile shards with little memory."""
    form = shard_format(name)
    testing.check_ranges(form)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BOUNDED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    testing_damage.check_other_manifest(form)
    testing_damage.check_other_attributes(form)
    testing_damage.check_hostile_bytes(form)
    print("kept")


if __name__ == "__main__":
    read_hostile_shards(sys.argv[1])
