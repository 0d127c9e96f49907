"""Writing a shard: an attempt whose time is up is never committed."""

from pathlib import Path

import pytest

from stillroom.cache import shard_writer
from stillroom.cache.attempt import Attempt
from stillroom.cache.shard_writer import NewShard, ScoredBy, write_shard
from stillroom.cache.store import Cache
from tests.cache.fakes import make_identity, make_meta, random_arrays


class Slow(Attempt):
    """The first is committed too late."""

    made = 0

    def expired(self) -> bool:
        Slow.made += 1
        return Slow.made == 1


def test_an_attempt_whose_time_is_up_is_left_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "Attempt", Slow)
    cache = Cache.create(tmp_path, make_identity())
    shard = NewShard(
        meta=make_meta(),
        rollouts_hash="0" * 32,
        arrays=random_arrays(0, 20, cache.identity.topk),
        scored_by=ScoredBy(teacher_s=1.0, scorer={}),
    )
    commit = write_shard(cache.storage, cache.identity, shard)
    assert commit is not None
    attempts = [path.name for path in tmp_path.glob("scores/*/*")]
    assert len(attempts) == 2
    assert cache.commit_of(make_meta().name).attempt == commit.attempt
    assert len(cache.shard(commit).all_rows()["topk_id"]) == 20
