"""A cache on S3 is repaired, scored again, cleaned and converted, with the same outcome as on a
disk."""

from pathlib import Path

import pytest

from stillroom.cache.clock import DAY_S
from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.errors import CorruptError
from stillroom.cache.pins import pin
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.tools.cli import main
from stillroom.tools.convert import convert
from tests.cache.fakes import FakeTeacher, same_bits
from tests.cache.s3 import S3
from tests.integration.test_s3 import quick_cache


def damage(cache: Cache, part: str) -> str:
    """Flip a bit of a part's shard; its path."""
    shard = cache.shard(cache.commit_of(part))
    data = bytearray(cache.storage.get(shard.path))
    data[shard.manifest.arrays["topk_code"].chunks[0].offset] ^= 1
    cache.storage.put(shard.path, bytes(data))
    return shard.path


def test_repaired_scored_again_and_cleaned(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    cache = quick_cache(s3)
    score(cache, FakeTeacher())
    first, second, third = cache.parts()
    good = {part: cache.read(part) for part in cache.parts()}
    path = damage(cache, first)
    with pytest.raises(CorruptError, match=first):
        cache.read(first)
    assert main(["verify", cache.storage.root, "--repair"]) == 1
    assert "put into quarantine" in capsys.readouterr().out
    assert cache.unscored() == [first]
    assert score(cache, FakeTeacher()).scored == [first]
    assert cache.commit_of(first).n == 1
    assert main(["verify", cache.storage.root, "--deep"]) == 0

    cache.retire(second, "old")
    cache.retire(third, "old")
    pin(cache.storage, "a-run", [cache.snapshot([third]).id], lifetime_s=30 * DAY_S)
    in_two_days = cache.storage.now() + 2 * DAY_S
    done = collect(
        cache, plan_collection(cache, clock=lambda: in_two_days), clock=lambda: in_two_days
    )
    assert {item.part for item in done.rubbish if item.kind == "shard"} == {first, second}
    assert not cache.storage.exists(path), "the damaged shard's bytes are gone"
    left = {entry.path.split("/")[1] for entry in cache.storage.list("scores")}
    assert left == {first, third}, "one is scored again, one is pinned"
    assert len(cache.storage.list("commits")) == 4
    for part in (first, third):
        found = cache.read(part)
        assert all(same_bits(found[name], array) for name, array in good[part].items())
    assert main(["verify", cache.storage.root, "--deep"]) == 0


def test_converted_from_s3_to_a_disk(s3: S3, tmp_path: Path) -> None:
    cache = quick_cache(s3)
    score(cache, FakeTeacher())
    done = convert(cache, str(tmp_path / "there"), "parquet")
    assert done.shards == cache.parts()
    there = Cache.open(tmp_path / "there")
    for part in cache.parts():
        one, other = cache.read(part), there.read(part)
        assert all(same_bits(one[name], other[name]) for name in one)
