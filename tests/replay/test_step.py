"""Planned steps: each row on one rank, bounded micro-batches, as many of them on every rank."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Feed, Source
from stillroom.replay.place import Place
from stillroom.replay.row_filter import RowFilter
from stillroom.replay.step import Item, Planner, Position, Step
from stillroom.replay.stream import ReplayStream
from stillroom.replay.stream_checks import check_batch
from tests.replay.conftest import (
    IDENTITY,
    add_grouped_part,
    add_scored_part,
    made_up_table,
    part_meta,
    score_table,
)

LONGEST = 14
"""Tokens of the longest made-up row, at most."""
STEPS = 4


def grouped_table(seed: int, rows: int, version: int) -> pa.Table:
    """Rollouts of which up to six, one after another, have the same prompt."""
    rng = np.random.default_rng(seed)
    table = made_up_table(rng, rows, version)
    records = table.to_pylist()
    first = 0
    while first < rows:
        count = int(rng.integers(1, 7))
        for record in records[first : first + count]:
            record |= {name: records[first][name] for name in ("prompt", "prompt_id")}
        first += count
    return pa.Table.from_pylist(records, table.schema)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Two caches of two parts each, of policies 0 and 1."""
    made = []
    for number, sizes in enumerate(((23, 18), (9, 14))):
        cache = Cache.create(tmp_path_factory.mktemp("grouped") / "cache", IDENTITY)
        for unit, rows in enumerate(sizes):
            table = grouped_table(10 * number + unit, rows, unit)
            score_table(cache, table, part_meta(unit, unit))
        made.append(cache)
    return made


def open_feeds(caches: list[Cache], config: StreamConfig) -> list[Feed]:
    """Feeds of whole caches."""
    return [Feed(Source(cache, cache.snapshot()), i, config) for i, cache in enumerate(caches)]


def plan_steps(
    feeds: list[Feed],
    config: StreamConfig,
    world: int,
    *,
    one_row: bool = False,
    steps: int,
    share: Sequence[int] = (3, 2),
) -> list[list[Step]]:
    """The first steps, of every rank."""
    share = share[: len(feeds)]
    planners = [Planner(feeds, share, config, rank, world, one_row) for rank in range(world)]
    at = Position(0, 0, (Place(),) * len(feeds))
    out = []
    for number in range(steps):
        found = [planner.next(at) for planner in planners]
        (at,) = {after for _, after in found}
        assert at.step == number + 1
        out.append([step for step, _ in found])
    return out


def items_of(step: Step) -> list[Item]:
    """All items of a rank's share."""
    return [item for items in step.micro_batches for item in items]


def tokens_of(item: Item, shared: bool) -> int:
    """Tokens of an item, from the lengths of its rows."""
    selection = item.feed.selection
    places = np.searchsorted(selection.rows, item.rows)
    tokens, prompt, _ = selection.lengths[places].astype(int).T
    assert shared or len(tokens) == 1
    return int(prompt[0] + (tokens - prompt).sum())


@dataclass
class Case:
    """Settings of a plan."""

    config: StreamConfig
    world: int
    one_row: bool
    num_caches: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any settings that fit the caches."""
    group = draw(st.integers(1, 5))
    num_caches = draw(st.integers(1, 2))
    config = StreamConfig(
        batch_rows=group * draw(st.integers(1, 7)),
        group_rows=group,
        share_prompts=group > 1 and draw(st.booleans()),
        max_tokens=draw(st.integers(LONGEST, 60)),
        block_rows=draw(st.integers(1, 12)),
        window_rows=draw(st.integers(1, 12)),
        last_batch="carry" if num_caches > 1 else draw(st.sampled_from(("keep", "drop", "carry"))),
        seed=draw(st.integers(0, 99)),
        even_ranks=draw(st.booleans()),
    )
    return Case(config, draw(st.integers(1, 6)), draw(st.booleans()), num_caches)


@settings(max_examples=30)
@given(cases())
def test_every_row_of_a_step_lands_on_one_rank(caches: list[Cache], case: Case) -> None:
    feeds = open_feeds(caches[: case.num_caches], case.config)
    for ranks in plan_steps(feeds, case.config, case.world, one_row=case.one_row, steps=STEPS):
        facts = {(s.epoch, s.first, s.rows, s.caches, s.num_positions) for s in ranks}
        assert len(facts) == 1
        landed = Counter(
            (item.feed.number, row)
            for step in ranks
            for item in items_of(step)
            for row in item.rows
        )
        whole = ranks[0]
        expected = Counter(zip(whole.caches, whole.rows, strict=True))
        assert landed == expected
        positions = sum(
            int(feeds[c].selection.lengths[row, 2]) * n for (c, row), n in landed.items()
        )
        assert positions == whole.num_positions


@settings(max_examples=30)
@given(cases())
def test_micro_batches_are_bounded_and_as_many_on_every_rank(
    caches: list[Cache], case: Case
) -> None:
    feeds = open_feeds(caches[: case.num_caches], case.config)
    for ranks in plan_steps(feeds, case.config, case.world, one_row=case.one_row, steps=STEPS):
        counts = [len(step.micro_batches) for step in ranks]
        filled = [sum(map(bool, step.micro_batches)) for step in ranks]
        assert set(counts) == {max(filled)}, "no rank runs more than the one that has to"
        for step, full in zip(ranks, filled, strict=True):
            assert all(step.micro_batches[:full]), "empty ones come last"
            for items in step.micro_batches:
                assert len(items) <= 1 or not case.one_row
                tokens = [tokens_of(item, bool(case.config.share_prompts)) for item in items]
                assert [item.tokens for item in items] == tokens
                assert sum(tokens) <= case.config.max_tokens


@settings(max_examples=30)
@given(cases())
def test_a_group_stays_on_a_rank(caches: list[Cache], case: Case) -> None:
    feeds = open_feeds(caches[: case.num_caches], case.config)
    for ranks in plan_steps(feeds, case.config, case.world, steps=STEPS):
        where: dict[tuple[int, int], set[int]] = {}
        for rank, step in enumerate(ranks):
            for item in items_of(step):
                unit_start = item.feed.selection.unit_start
                places = np.searchsorted(item.feed.selection.rows, item.rows)
                units = np.searchsorted(unit_start, places, "right") - 1
                assert len(set(units)) == 1, "no item holds rows of two groups"
                assert case.config.share_prompts or len(item.rows) == 1
                where.setdefault((item.feed.number, int(units[0])), set()).add(rank)
        repeats = Counter(zip(ranks[0].caches, ranks[0].rows, strict=True)).most_common(1)[0][1]
        assert all(len(on) <= repeats for on in where.values()), "one, each time that it comes"


@pytest.mark.parametrize("max_tokens", [LONGEST, 18, 23, 29])
def test_a_group_larger_than_a_micro_batch_is_split_where_it_must(
    caches: list[Cache], max_tokens: int
) -> None:
    config = StreamConfig(batch_rows=6, group_rows=6, share_prompts=True, max_tokens=max_tokens)
    (feed,) = open_feeds(caches[:1], config)
    split = 0
    for (step,) in plan_steps([feed], config, 1, steps=feed.units):
        items = sorted(items_of(step), key=lambda item: item.rows)
        assert all(tokens_of(item, True) <= max_tokens for item in items)
        for before, after in pairwise(items):
            tokens, prompt, _ = feed.selection.lengths[after.rows[0]].tolist()
            assert before.tokens + tokens - prompt > max_tokens, "its first row did not fit"
            split += 1
    assert split


def test_a_shared_prompt_counts_once(caches: list[Cache]) -> None:
    config = StreamConfig(batch_rows=12, group_rows=6, share_prompts=True, max_tokens=500)
    feeds = open_feeds(caches[:1], config)
    ((step,), *_) = plan_steps(feeds, config, 1, steps=1)
    lengths = feeds[0].selection.lengths.astype(int)
    sizes = {len(item.rows) for item in items_of(step)}
    assert len(sizes) > 1, "groups of several sizes"
    for item in items_of(step):
        own = lengths[np.searchsorted(feeds[0].selection.rows, item.rows)]
        assert item.tokens == own[:, 0].sum() - (len(own) - 1) * own[0, 1]
    (micro,) = step.micro_batches
    assert len(micro) == 2, "two groups in one micro-batch"


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One part of 800 rows."""
    cache = Cache.create(tmp_path_factory.mktemp("long") / "cache", IDENTITY)
    score_table(cache, made_up_table(np.random.default_rng(0), 800, 0), part_meta(0, 0))
    return cache


@pytest.mark.parametrize(("block", "window", "batch"), [(8, 8, 64), (5, 12, 40), (16, 10, 64)])
def test_a_rank_reads_its_own_lanes_where_the_world_divides_them(
    long_cache: Cache, block: int, window: int, batch: int
) -> None:
    config = StreamConfig(batch_rows=batch, block_rows=block, window_rows=window, seed=1)
    (feed,) = open_feeds([long_cache], config)
    rows, blocks = feed.units, -(-feed.units // block)
    lanes = max(1, min(64, rows // window))
    assert lanes == 64
    steps = -(-rows // batch)
    for world in (1, 2, 8):
        read = _blocks_read(feed, config, world, steps)
        assert len(set().union(*read)) == blocks
        most = -(-rows // (block * world)) + 2 * lanes // world
        assert max(map(len, read)) <= min(most, blocks)
        assert sum(map(len, read)) <= blocks + lanes, "only blocks at lane edges are read twice"
    assert sum(map(len, _blocks_read(feed, config, 3, steps))) > 1.5 * blocks


def _blocks_read(feed: Feed, config: StreamConfig, world: int, steps: int) -> list[set[int]]:
    """The blocks that each rank needs in an epoch."""
    read: list[set[int]] = [set() for _ in range(world)]
    for ranks in plan_steps([feed], config, world, steps=steps):
        for own, step in zip(read, ranks, strict=True):
            own |= {block for _, block in Step.keys(step)}
    return read


def off_by(feed: Feed, caches: int) -> float:
    """Rows by which a cache may be off its share: as many units as there are caches, and what the
    sizes of an epoch's units differ by."""
    sizes = np.diff(feed.selection.unit_start)
    return float(caches * sizes.mean() + np.abs(sizes - sizes.mean()).sum() / 2)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=2), st.integers(1, 6), st.integers(1, 5))
def test_shares_are_of_rows_over_any_prefix(
    caches: list[Cache], long_cache: Cache, share: list[int], group: int, batch: int
) -> None:
    """Of a cache of groups, and of one whose prompts have a rollout each."""
    config = StreamConfig(batch_rows=group * batch, group_rows=group, last_batch="carry")
    feeds = open_feeds([caches[0], long_cache], config)
    most = [off_by(feed, 2) for feed in feeds]
    counts: Counter[int] = Counter()
    for (step,) in plan_steps(feeds, config, 1, steps=80 // batch, share=share):
        counts.update(step.caches)
        for own, other in ((0, 1), (1, 0)):
            part = share[own] / sum(share)
            off = abs(counts[own] - part * counts.total())
            assert off <= (1 - part) * most[own] + part * most[other]


def test_shares_are_of_rows_where_older_units_come_less_often(tmp_path: Path) -> None:
    """The old units of one cache are single rows, and its new ones are groups of four."""
    made = [Cache.create(tmp_path / name, IDENTITY) for name in "ab"]
    add_scored_part(made[0], 0, 0, 60)
    add_grouped_part(made[0], 4, 1, prompts=15, samples=4)
    add_scored_part(made[1], 4, 0, 60)
    config = StreamConfig(batch_rows=40, group_rows=4, last_batch="carry", lag_half_life=1.0)
    feeds = open_feeds(made, config)
    steps = plan_steps(feeds, config, 1, steps=400, share=[1, 1])
    counts = Counter(cache for (step,) in steps for cache in step.caches)
    assert abs(counts[0] / counts.total() - 0.5) < 0.01


def test_shares_are_of_rows_where_little_of_a_cache_comes(tmp_path: Path) -> None:
    """In a quarter of its epochs, that is the single row of the least lag alone."""
    made = [Cache.create(tmp_path / name, IDENTITY) for name in "ab"]
    add_grouped_part(made[0], 0, 0, prompts=40, samples=4)
    add_scored_part(made[0], 1, 1, 1)
    add_scored_part(made[0], 5, 2, 3)
    add_scored_part(made[1], 5, 3, 40)
    config = StreamConfig(batch_rows=8, group_rows=4, last_batch="carry", lag_half_life=1.0)
    old = RowFilter(max_policy_version=1)
    sources = [Source(made[0], made[0].snapshot(), rows=old), Source(made[1], made[1].snapshot())]
    feeds = [Feed(source, number, config) for number, source in enumerate(sources)]
    check_batch(feeds, config)
    steps = plan_steps(feeds, config, 1, steps=3000, share=[1, 1])
    counts = Counter(cache for (step,) in steps for cache in step.caches)
    assert abs(counts[0] / counts.total() - 0.5) < 0.015


def test_one_cache_alone_asks_for_no_mean_sizes(
    caches: list[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Feed, "unit_rows", None)
    config = StreamConfig(batch_rows=10, group_rows=2, lag_half_life=1.0)
    ((step,),) = plan_steps(open_feeds(caches[:1], config), config, 1, steps=1)
    assert step.rows


def test_a_step_needs_the_blocks_of_its_own_rows_only(caches: list[Cache]) -> None:
    config = StreamConfig(batch_rows=10, block_rows=4, window_rows=5, last_batch="carry")
    feeds = open_feeds(caches, config)
    for ranks in plan_steps(feeds, config, 3, steps=STEPS):
        for step in ranks:
            rows = [(item.feed, number) for item in items_of(step) for number in item.rows]
            assert step.keys() == {(feed, number // 4) for feed, number in rows}


def test_planning_far_on_costs_no_more(
    caches: list[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StreamConfig(batch_rows=10, block_rows=4, window_rows=5, last_batch="carry")
    feeds = open_feeds(caches, config)
    planner = Planner(feeds, [3, 2], config, 0, 1, False)
    asked: list[int] = []
    units_in = Feed.units_in

    def counted(feed: Feed, epoch: int) -> int:
        asked.append(epoch)
        return units_in(feed, epoch)

    monkeypatch.setattr(Feed, "units_in", counted)
    far = Position(10**6, 10**7, (Place(146341, 0), Place(173913, 3)))
    step, after = planner.next(far)
    assert len(step.rows) == 10
    assert after.step == 10**6 + 1
    assert set(asked) <= {146341, 146342, 173913, 173914}
    assert len(asked) < 20


def test_no_release_changes_a_stream_of_groups_lags_and_several_caches(
    caches: list[Cache],
) -> None:
    config = StreamConfig(
        batch_rows=9,
        group_rows=3,
        max_tokens=60,
        block_rows=4,
        window_rows=6,
        last_batch="carry",
        lag_half_life=0.7,
        seed=5,
    )
    weights = (1.5, 1.0)
    sources = [Source(c, c.snapshot(), w) for c, w in zip(caches, weights, strict=True)]
    with ReplayStream(sources, config) as stream:
        batches = list(islice(stream, 40))
    found = [list(zip(batch.caches, batch.rows, strict=True)) for batch in batches]
    assert found[:2] == [
        [(0, 6), (0, 7), (0, 8), (1, 15), (1, 16), (1, 13), (1, 14)],
        [(0, 26), (0, 27), (0, 28), (0, 39), (0, 40), (1, 17)],
    ]
    sha256 = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert sha256[:32] == "536460273fc1531372c59a793fd066e5"
