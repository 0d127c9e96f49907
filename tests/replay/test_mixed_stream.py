"""Several caches in one stream: exact shares, epochs of their own, and every value its cache's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_record import record
from tests.replay.conftest import IDENTITY, add_grouped_part, add_scored_part

CONFIG = StreamConfig(
    batch_rows=6, max_tokens=60, block_rows=4, window_rows=5, seed=3, last_batch="carry"
)
COLUMNS = (
    "topk_id",
    "topk_logprob",
    "tail_logprob",
    "sampled_logprob",
    "behaviour_logprob",
    "extra_id",
    "extra_logprob",
    "extra_behaviour_logprob",
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Caches of 7, 11 and 5 rows, with other K and M."""
    folder = tmp_path_factory.mktemp("three")
    made = []
    for i, (topk, extra, rows) in enumerate([(3, 0, 7), (5, 2, 11), (1, 3, 5)]):
        kind = "tail" if extra else "none"
        identity = replace(IDENTITY, topk=topk, extra=extra, extra_kind=kind)
        cache = Cache.create(folder / f"{i}", identity)
        add_scored_part(cache, i, i, rows)
        made.append(cache)
    return made


def mix(
    caches: Sequence[Cache], weights: Sequence[float], rank: int = 0, world: int = 1, **changes: Any
) -> ReplayStream:
    """A stream of caches in these shares."""
    sources = [Source(c, c.snapshot(), weight) for c, weight in zip(caches, weights, strict=True)]
    return ReplayStream(sources, replace(CONFIG, **changes), rank=rank, world=world)


def take(stream: ReplayStream, count: int) -> list[Batch]:
    """The next batches; then the stream is closed."""
    with stream:
        return [stream.next_batch() for _ in range(count)]


def real(batch: Batch) -> list[MicroBatch]:
    """Micro-batches that hold something."""
    return [micro for micro in batch.micro_batches if micro is not None]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.2), (1, 1000, 3.7), (1e-6, 1, 1)])
@pytest.mark.parametrize("batch_rows", [1, 6, 20])
def test_shares_are_exact_over_any_prefix(
    three: list[Cache], weights: tuple[float, ...], batch_rows: int
) -> None:
    counts: Counter[int] = Counter()
    for batch in take(mix(three, weights, batch_rows=batch_rows), 60 // batch_rows):
        assert len(batch.rows) == len(batch.caches) == batch_rows
        counts.update(batch.caches)
        for cache, weight in enumerate(weights):
            exact = counts.total() * weight / sum(weights)
            assert abs(counts[cache] - exact) < len(weights)


def test_groups_of_one_cache_and_single_rows_of_another_have_equal_shares(tmp_path: Path) -> None:
    made = [Cache.create(tmp_path / name, IDENTITY) for name in "ab"]
    add_grouped_part(made[0], 0, 0, prompts=20, samples=4)
    add_scored_part(made[1], 0, 1, 40)
    stream = mix(made, (0.5, 0.5), batch_rows=16, group_rows=4)
    counts: Counter[int] = Counter()
    for batch in take(stream, 40):
        counts.update(batch.caches)
        assert abs(counts[0] - counts[1]) <= 8
    assert counts.total() > 200


def test_each_cache_has_epochs_of_its_own(three: list[Cache]) -> None:
    rows: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in take(mix(three, (0.2, 0.5, 0.3)), 20):
        for cache, row in zip(batch.caches, batch.rows, strict=True):
            rows[cache].append(row)
    for cache, size in ((0, 7), (1, 11), (2, 5)):
        epochs = [rows[cache][i : i + size] for i in range(0, len(rows[cache]), size)]
        full = [epoch for epoch in epochs if len(epoch) == size]
        assert len(full) >= 3
        assert all(sorted(epoch) == list(range(size)) for epoch in full)
        assert len({tuple(epoch) for epoch in full}) == len(full), "another order every time"


def test_two_caches_of_equal_sizes_are_not_in_step(scored_cache: Cache) -> None:
    batches = take(mix([scored_cache, scored_cache], (1, 1), batch_rows=74), 1)
    first, second = batches[0].rows[:37], batches[0].rows[37:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_step_may_hold_several_epochs_of_a_small_cache(three: list[Cache]) -> None:
    (batch,) = take(mix(three, (1, 5, 10), batch_rows=16), 1)
    counts = Counter(row for row, cache in zip(batch.rows, batch.caches, strict=True) if cache == 2)
    assert counts == dict.fromkeys(range(5), 2)
    held = [row for cache, row, _ in record(batch).held if cache == 2]
    assert Counter(held) == counts


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_every_step(three: list[Cache], world: int) -> None:
    weights = (0.2, 0.5, 0.3)
    alone = [record(batch) for batch in take(mix(three, weights), 12)]
    ranks = [[record(b) for b in take(mix(three, weights, r, world), 12)] for r in range(world)]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert {share.rows for share in shares} == {whole.rows}
        assert {share.caches for share in shares} == {whole.caches}
        assert sorted(row for share in shares for row in share.held) == list(whole.held)
        assert len({len(share.micro_batches) for share in shares}) == 1


def by_hand(cache: Cache, row: int, width: dict[str, int]) -> dict[str, np.ndarray]:
    """Scores of a row of a cache of one part, padded to the widths of a micro-batch."""
    (part,) = cache.parts()
    arrays = cache.read(part, row, row + 1)
    found = {}
    for name in COLUMNS:
        if name in arrays and arrays[name].ndim == 1:
            found[name] = arrays[name]
            continue
        positions = len(arrays["sampled_logprob"])
        own = arrays.get(name, np.zeros((positions, 0)))
        unused = -1 if name.endswith("_id") else -np.inf
        unused = np.nan if name == "extra_behaviour_logprob" else unused
        values = np.full((positions, width[name]), unused)
        values[:, : own.shape[1]] = own
        found[name] = values
    return found


def test_every_position_has_the_values_of_its_cache(three: list[Cache]) -> None:
    seen: Counter[int] = Counter()
    shapes = set()
    for batch in take(mix(three, (1, 1, 1)), 12):
        for micro in real(batch):
            shapes.add((micro.topk_id.shape[1], micro.extra_id.shape[1]))
            width = {name: getattr(micro, name).shape[-1] for name in COLUMNS}
            for cache, row in set(zip(micro.cache.tolist(), micro.row.tolist(), strict=True)):
                own = (micro.cache == cache) & (micro.row == row)
                assert set(micro.policy_version[own]) == {cache}
                wanted = by_hand(three[cache], row, width)
                repeats = int(own.sum()) // len(wanted["tail_logprob"])
                for name in COLUMNS:
                    values = np.concatenate([wanted[name]] * repeats)
                    np.testing.assert_array_equal(getattr(micro, name)[own], values, name)
                seen[cache] += 1
    assert set(seen) == {0, 1, 2}
    assert max(shapes) == (5, 3), "K and M of the widest in the micro-batch"


def test_on_and_off_policy_rows_of_one_cache_are_mixed(scored_cache: Cache) -> None:
    snapshot = scored_cache.snapshot()
    on = Source(scored_cache, snapshot, 0.75, RowFilter(sources=("student",)))
    off = Source(scored_cache, snapshot, 0.25, RowFilter(sources=("teacher",)))
    counts: Counter[int] = Counter()
    rows: dict[int, set[int]] = {0: set(), 1: set()}
    for batch in take(ReplayStream([on, off], replace(CONFIG, batch_rows=4)), 20):
        assert Counter(batch.caches) == {0: 3, 1: 1}
        for micro in real(batch):
            np.testing.assert_array_equal(micro.source, micro.cache + 1)
            counts.update(micro.cache.tolist())
            for cache in (0, 1):
                rows[cache].update(micro.row[micro.cache == cache].tolist())
    starts, sizes = (0, 11, 28), (11, 17, 9)
    for cache in (0, 1):
        wanted = {s + i for s, n in zip(starts, sizes, strict=True) for i in range(cache, n, 3)}
        assert rows[cache] == wanted


def test_the_settings_filter_holds_where_a_source_has_none(scored_cache: Cache) -> None:
    config = replace(CONFIG, rows=RowFilter(sources=("import",)))
    snapshot = scored_cache.snapshot()
    own = Source(scored_cache, snapshot, 1, RowFilter(sources=("teacher",)))
    for batch in take(ReplayStream([Source(scored_cache, snapshot), own], config), 6):
        for micro in real(batch):
            np.testing.assert_array_equal(micro.source, np.where(micro.cache == 0, 4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_fingerprint": "u" * 32}, "expected tokenizer_fingerprint = 'ttt.*got 'uuu"),
        ({"vocab_size": 49}, "expected vocab_size = 50; got 49"),
        ({"temperature": 2.0}, r"expected temperature = 1\.0; got 2\.0"),
    ],
)
def test_caches_that_do_not_fit_are_refused(
    scored_cache: Cache, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    cache = Cache.create(tmp_path / "cache", replace(IDENTITY, **change))
    snapshot = scored_cache.snapshot()
    source = Source(cache, snapshot)
    with pytest.raises(MismatchError, match=message) as caught:
        ReplayStream([Source(scored_cache, snapshot), source], CONFIG)
    assert str(tmp_path) in caught.value.where


@pytest.mark.parametrize(
    "change", [{"last_batch": "keep"}, {"last_batch": "drop"}, {"follow_every_steps": -1}]
)
def test_epochs_of_several_caches_do_not_end_together(
    three: list[Cache], change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="carry, and no epoch's end to follow at"):
        mix(three, (1, 1, 1), **change)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e-12])
def test_weights_that_are_no_shares_are_refused(three: list[Cache], weight: float) -> None:
    with pytest.raises(ConfigError, match="weights of caches"):
        mix(three, (1, weight, 1))


def test_weights_are_part_of_the_state(three: list[Cache]) -> None:
    stream = mix(three, (1, 2, 1))
    stream.skip(5)
    state = stream.state_dict()
    same = mix(three, (2, 4, 2))
    same.load_state_dict(state)
    assert take(same, 1)[0].rows == take(stream, 1)[0].rows
    with pytest.raises(MismatchError, match="expected share = "):
        mix(three, (1, 1, 1)).load_state_dict(state)
    with pytest.raises(MismatchError, match="expected identity = "):
        mix([three[2], three[1], three[0]], (1, 2, 1)).load_state_dict(state)


def test_an_epoch_of_all_is_as_many_steps_as_their_rows_fill(three: list[Cache]) -> None:
    assert mix(three, (1, 1, 1)).steps_per_epoch == 4
