"""Batches of a dataset: each row once an epoch on any number of ranks, packed, resumable."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.errors import ConfigError, CorruptError, InputError, MismatchError
from stillroom.cache.schema import SOURCES
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.train.supervised import SupervisedStream
from tests.train.supervised_rows import CONFIG, COUNT, made_rows

NAMES = ("token", "sampled_id", "row", "position_id", "predict_index")


def opened(rank: int = 0, world: int = 1, **changes: Any) -> SupervisedStream:
    """A stream over the made-up rows."""
    one_row = changes.pop("one_row", False)
    config = replace(CONFIG, **changes)
    return SupervisedStream(made_rows(), config, rank=rank, world=world, one_row=one_row)


def filled(batches: Sequence[Batch]) -> list[MicroBatch]:
    """All micro-batches but idle ones."""
    return [micro for batch in batches for micro in batch.micro_batches if micro is not None]


def cut(micro: MicroBatch) -> list[tuple[Any, ...]]:
    """Of each row in it: tokens, positions within it that predict, and what they are to say."""
    rows = []
    for start, stop in zip(micro.row_start, micro.row_start[1:], strict=False):
        own = (micro.predict_index >= start) & (micro.predict_index < stop)
        tokens = tuple(micro.token[start:stop].tolist())
        predicting = tuple((micro.predict_index[own] - start).tolist())
        assert micro.position_id[start:stop].tolist() == list(range(stop - start))
        rows.append((tokens, predicting, tuple(micro.sampled_id[own].tolist())))
    return rows


def expected_rows() -> list[tuple[Any, ...]]:
    """What `cut` must give, by hand from the made-up rows."""
    data, rows = made_rows(), []
    for start, stop in zip(data.start, data.start[1:], strict=False):
        token, scored = data.token[start:stop], np.flatnonzero(data.scored[start:stop])
        predicting = tuple((scored - 1).tolist())
        rows.append((tuple(token.tolist()), predicting, tuple(token[scored].tolist())))
    return rows


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4), st.integers(1, COUNT), st.integers(12, 60), st.booleans(), st.integers(0, 9)
)
def test_every_row_once_an_epoch_whole_and_packed(
    world: int, batch_rows: int, max_tokens: int, one_row: bool, seed: int
) -> None:
    changes = {"batch_rows": batch_rows, "max_tokens": max_tokens, "one_row": one_row, "seed": seed}
    streams = [opened(rank, world, **changes) for rank in range(world)]
    steps = [[s.next_batch() for s in streams] for _ in range(streams[0].steps_per_epoch)]
    found = []
    for ranks in steps:
        assert len({(b.rows, b.num_positions, b.epoch, b.first) for b in ranks}) == 1
        assert len({len(b.micro_batches) for b in ranks}) == 1, "collectives meet"
        micros = filled(ranks)
        assert sum(m.num_positions for m in micros) == ranks[0].num_positions
        for micro in micros:
            assert len(micro.token) <= max_tokens
            assert not one_row or len(micro.prefix) == 1
            found += cut(micro)
    assert Counter(found) == Counter(expected_rows())
    assert sorted(row for ranks in steps for row in ranks[0].rows) == list(range(COUNT))


def test_nothing_is_known_of_a_teacher() -> None:
    for micro in filled([opened().next_batch()]):
        assert micro.topk_id.shape == micro.extra_id.shape == (micro.num_positions, 0)
        assert (micro.tail_logprob == 0).all(), "all mass is in the tail"
        assert np.isneginf(micro.sampled_logprob).all(), "unused"
        assert np.isnan(micro.behaviour_logprob).all()
        assert np.isnan(micro.sampling_temperature).all()
        assert (micro.policy_version == -1).all()
        assert {SOURCES[code] for code in micro.source} == {"dataset"}


def test_epochs_have_orders_of_their_own_from_the_seed() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        stream = opened(seed=seed, batch_rows=COUNT)
        return [stream.next_batch().rows for _ in range(3)]

    assert orders(1) == orders(1)
    assert len({*orders(1), *orders(2)}) == 6


@pytest.mark.parametrize("last_batch", ["keep", "drop", "carry"])
def test_the_end_of_an_epoch(last_batch: str) -> None:
    stream = opened(last_batch=last_batch)
    sizes = [len(stream.next_batch().rows) for _ in range(stream.steps_per_epoch + 1)]
    assert sizes == {"keep": [5] * 4 + [3, 5], "drop": [5] * 5, "carry": [5] * 6}[last_batch]


@pytest.mark.parametrize("last_batch", ["keep", "drop", "carry"])
def test_a_state_goes_on_with_the_next_batch(last_batch: str) -> None:
    whole = opened(last_batch=last_batch)
    for step in range(12):
        resumed = opened(last_batch=last_batch)
        resumed.load_state_dict(whole.state_dict())
        batch, expected = resumed.next_batch(), whole.next_batch()
        assert batch.rows == expected.rows
        for mine, other in zip(filled([batch]), filled([expected]), strict=True):
            assert all(np.array_equal(getattr(mine, n), getattr(other, n)) for n in NAMES)
        assert whole.state_dict()["step"] == step + 1


def test_a_resumed_run_may_have_other_ranks_and_batches() -> None:
    one = opened()
    first = one.next_batch().rows
    two = [opened(rank, 2, batch_rows=9) for rank in range(2)]
    for stream in two:
        stream.load_state_dict(one.state_dict())
    batches = [stream.next_batch() for stream in two]
    assert batches[0].rows == batches[1].rows
    assert len({*first, *batches[0].rows}) == 5 + 9


def test_states_of_others_are_refused() -> None:
    stream = opened()
    state = stream.state_dict()
    for changes in ({"seed": 9}, {"last_batch": "drop"}):
        with pytest.raises(MismatchError, match=next(iter(changes))):
            opened(**changes).load_state_dict(state)
    other = SupervisedStream(made_rows(seed=1), CONFIG)
    with pytest.raises(MismatchError, match="state, rows"):
        other.load_state_dict(state)
    for wrong in (
        {},
        {**state, "first": COUNT + 1},
        {**state, "epoch": -1},
        {**state, "step": "1"},
    ):
        with pytest.raises(CorruptError):
            stream.load_state_dict(wrong)
    assert stream.state_dict() == state


def test_refusals() -> None:
    with pytest.raises(InputError, match=f"at most the {COUNT} rows; got 24"):
        opened(batch_rows=COUNT + 1)
    with pytest.raises(ConfigError, match="rank"):
        opened(2, 2)
    stream = opened()
    stream.close()
    with pytest.raises(ConfigError, match="a closed one"):
        stream.next_batch()
