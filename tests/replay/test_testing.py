"""The check that streams resume anywhere: it passes for sound ones, and sees what is broken."""

from typing import Any

import pytest

from stillroom.cache.store import Cache
from stillroom.replay import testing
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import StoredSource
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.testing import (
    StoredStream,
    Variant,
    check_cost,
    check_resume,
    in_new_process,
    variants_of,
)
from tests.replay.broken_streams import Broken
from tests.replay.conftest import add_grouped_part

CONFIG = StreamConfig(
    batch_rows=9, max_tokens=40, block_rows=4, window_rows=5, ahead_bytes=2000, seed=3
)
FEW = [Variant(), Variant(2), Variant(3, {"batch_rows": 3})]

pytestmark = pytest.mark.dist


def source(cache: Cache, **settings: Any) -> StoredSource:
    """All of a cache."""
    root = str(cache.storage.root)
    return StoredSource(root=root, snapshot=cache.snapshot().id, **settings)


def stored(*caches: Cache, **changes: Any) -> StoredStream:
    """A stream over all of some caches."""
    sources = tuple(map(source, caches))
    config = {field: getattr(CONFIG, field) for field in CONFIG.__slots__} | changes
    return StoredStream(sources=sources, config=StreamConfig(**config))


def test_a_stream_resumes_anywhere(scored_cache: Cache) -> None:
    check_resume(stored(scored_cache), steps=6)


@pytest.mark.slow
def test_a_stream_without_short_batches_resumes_anywhere(scored_cache: Cache) -> None:
    check_resume(stored(scored_cache, last_batch="drop"), 6, FEW)


@pytest.mark.slow
def test_a_filtered_thinned_and_followed_stream_resumes_anywhere(scored_cache: Cache) -> None:
    rows = RowFilter(finish_reasons=("stop",))
    settings: dict[str, Any] = {"rows": rows, "lag_half_life": 2.0, "follow_every_steps": 3}
    check_resume(stored(scored_cache, **settings), 5, FEW)


def test_a_mixed_stream_resumes_anywhere(scored_cache: Cache, other_cache: Cache) -> None:
    sources = (source(scored_cache, weight=0.7), source(other_cache, weight=0.3))
    stream = StoredStream(sources=sources, config=stored(scored_cache, last_batch="carry").config)
    check_resume(stream, 6, FEW)
    check_cost(stream)


def test_groups_with_shared_prompts_resume_anywhere(empty_cache: Cache) -> None:
    add_grouped_part(empty_cache, 0, 0, prompts=7, samples=4)
    stream = stored(empty_cache, group_rows=3, share_prompts=True)
    unshared = Variant(changes={"share_prompts": False})
    check_resume(stream, 5, [*FEW, unshared])


def test_a_late_step_is_restored_as_easily_as_an_early_one(scored_cache: Cache) -> None:
    check_cost(stored(scored_cache, lag_half_life=3.0))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new process, which takes a second."""
    monkeypatch.setattr(testing, "in_new_process", lambda function, *given: function(*given))


BROKEN = {
    "Late": r"Variant.*, restored before step 2, 0 steps on: first: 27, not 18",
    "Forgetful": "step 0, 0 steps on: held rows",
    "Reordered": r"step 0, 0 steps on, micro-batch 0: \w+",
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_named(scored_cache: Cache, kind: str) -> None:
    sound = stored(scored_cache)
    broken = Broken(sources=sound.sources, config=sound.config, kind=kind)
    with pytest.raises(AssertionError, match=f"(?s){BROKEN[kind]}"):
        check_resume(broken, steps=4, variants=[Variant()])


def test_an_error_in_the_new_process_is_shown(scored_cache: Cache) -> None:
    sound = stored(scored_cache)
    broken = Broken(sources=sound.sources, config=sound.config, kind="Deaf")
    with pytest.raises(AssertionError, match=r"(?s)a new process failed: .*no such place"):
        check_resume(broken, steps=2, variants=[Variant()])


@pytest.mark.usefixtures("here")
def test_rows_that_two_ranks_hold_are_seen(scored_cache: Cache) -> None:
    sound = stored(scored_cache)
    broken = Broken(sources=sound.sources, config=sound.config, kind="OnOneRank")
    check_resume(broken, steps=2, variants=[Variant()])
    with pytest.raises(AssertionError, match=r"world=2.*step 0, 0 steps on: rows of all ranks"):
        check_resume(broken, steps=2, variants=[Variant(world=2)])


@pytest.mark.usefixtures("here")
def test_another_order_with_another_batch_is_seen(scored_cache: Cache) -> None:
    sound = stored(scored_cache)
    broken = Broken(sources=sound.sources, config=sound.config, kind="Late")
    half = Variant(changes={"batch_rows": 3})
    with pytest.raises(AssertionError, match=r"before step 2: order of rows of cache 0"):
        check_resume(broken, steps=4, variants=[half])


@pytest.mark.usefixtures("here")
def test_work_that_grows_with_the_step_is_seen(scored_cache: Cache) -> None:
    sound = stored(scored_cache)
    broken = Broken(sources=sound.sources, config=sound.config, kind="Replaying")
    with pytest.raises(AssertionError, match=r"restoring step 5000 takes \d+ calls"):
        check_cost(broken, steps=2, late=5000)


def test_states_are_restored_elsewhere() -> None:
    import os

    assert in_new_process(os.getpid) != os.getpid()


def test_variants_change_what_a_state_may_change() -> None:
    config = StreamConfig(batch_rows=12, group_rows=4)
    variants = variants_of(config)
    assert {variant.world for variant in variants} == {1, 2, 3, 4}
    batches = [v.changes["batch_rows"] for v in variants if "batch_rows" in v.changes]
    assert batches == [4, 4]
    assert {"threads", "cached_bytes", "ahead_bytes"} <= {n for v in variants for n in v.changes}
