"""Streams of phases: each step from the right one, shared data goes on, all of it resumable."""

import json
from dataclasses import replace
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, CorruptError, MismatchError
from stillroom.cache.identity import Identity, TeacherId
from stillroom.train.phase_streams import Opened, PhaseStreams
from stillroom.train.phases import Phase
from stillroom.train.supervised import SupervisedStream
from stillroom.train.supervised_data import SupervisedConfig
from tests.train.supervised_rows import CONFIG, COUNT, made_rows

TEACHER = TeacherId(
    name="made-up",
    revision=None,
    weight_format="F32",
    compute_dtype="float32",
    fingerprint="f" * 32,
)
IDENTITY = Identity(
    teacher=TEACHER, tokenizer_fingerprint="t" * 32, vocab_size=50, logit_width=50, topk=3
)
TEXT, OTHER = SupervisedConfig(source="text.jsonl"), SupervisedConfig(source="other.jsonl")
PHASES = (
    Phase(supervised=TEXT, max_steps=2),
    Phase(max_steps=3),
    Phase(supervised=OTHER, max_steps=1),
    Phase(supervised=TEXT, max_steps=1, learning_rate=1e-3),
)
STEPS = 7


def made(seed: int) -> Opened:
    """Data with rows and an order of its own."""
    return Opened(SupervisedStream(made_rows(), replace(CONFIG, seed=seed)), IDENTITY)


def opened(
    phases: tuple[Phase, ...] = PHASES,
    cycles: int = 2,
    per_step: int = 1,
    resumed: dict[str, Any] | None = None,
) -> tuple[PhaseStreams, dict[int, Opened]]:
    """Phases, and the data that was opened for them; the run's own stands at -1."""
    data = {-1: made(-1)}

    def open_one(index: int, phase: Phase) -> Opened:
        assert index not in data, "opened once"
        assert phase is phases[index]
        data[index] = made(index)
        return data[index]

    return PhaseStreams(phases, cycles, per_step, data[-1], open_one, resumed), data


def rows_of(streams: PhaseStreams, step: int) -> list[tuple[int, ...]]:
    """Rows of each batch of a step."""
    return [batch.rows for batch in streams.next_batches(streams.plan.at(step))]


def test_each_step_comes_from_its_phase_and_shared_data_goes_on() -> None:
    streams, data = opened()
    assert sorted(data) == [-1, 0, 2], "the last phase has the first one's data"
    assert streams.plan.total_steps == 2 * STEPS
    twins = {index: made(index).stream for index in data}
    source = {0: 0, 1: -1, 2: 2, 3: 0}
    for step in range(2 * STEPS):
        phase = streams.plan.at(step).phase
        assert streams.data(phase) is data[source[phase]]
        assert rows_of(streams, step) == [twins[source[phase]].next_batch().rows]


def test_epochs_and_accumulated_batches() -> None:
    """An epoch has 5 batches: a step's second one is missing at its end."""
    streams, _ = opened((Phase(num_train_epochs=2), Phase(supervised=TEXT)), 2, per_step=2)
    assert streams.plan.batches == (10, 5)
    found = [rows_of(streams, step) for step in range(streams.plan.total_steps)]
    assert [len(batches) for batches in found] == [2, 2, 2, 2, 2, 2, 2, 1] * 2
    rows = [row for batches in found[5:8] for batch in batches for row in batch]
    assert sorted(rows) == list(range(COUNT))


@pytest.mark.parametrize("at", range(2 * STEPS))
def test_a_state_goes_on_with_the_next_step(at: int) -> None:
    whole, data = opened()
    for step in range(at):
        rows_of(whole, step)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed, other = opened()
    resumed.load_state_dict(state)
    other[-1].stream.load_state_dict(data[-1].stream.state_dict())
    rest = range(at, 2 * STEPS)
    assert [rows_of(resumed, s) for s in rest] == [rows_of(whole, s) for s in rest]


def test_states_of_other_phases_are_refused() -> None:
    streams, _ = opened()
    state = streams.state_dict()
    opened(cycles=5)[0].load_state_dict(state)
    for phases in (PHASES[:-1], (*PHASES[:-1], Phase(max_steps=9)), PHASES[::-1]):
        with pytest.raises(MismatchError, match="state of the phases"):
            opened(phases)[0].load_state_dict(state)
    wrong: dict[str, Any]
    for wrong in ({}, {**state, "streams": 3}, {"streams": {}}):
        with pytest.raises(CorruptError, match="state of the phases"):
            streams.load_state_dict(wrong)
    with pytest.raises(MismatchError):
        streams.load_state_dict({**state, "streams": {"0": {}}})


@pytest.mark.parametrize("count", [1, 2])
def test_phases_stay_as_long_as_they_were(count: int) -> None:
    """Whatever an epoch of the data has now: its 5 batches were 3."""
    phases = (Phase(num_train_epochs=2), Phase(num_train_epochs=1))[:count]
    state = {"batches": [6, 3][:count], "streams": {}}
    streams, _ = opened(phases, 1, resumed=state)
    assert list(streams.plan.batches) == state["batches"]
    streams.load_state_dict(state)
    with pytest.raises(MismatchError, match="state of the phases"):
        opened(phases, 1)[0].load_state_dict(state)


@pytest.mark.parametrize("batches", [None, [], [3, 2], [0], [True], ["3"], [2.0]])
def test_lengths_that_are_none_are_refused(batches: Any) -> None:
    with pytest.raises((MismatchError, CorruptError), match="state of the phases"):
        opened((Phase(),), 1, resumed={"batches": batches, "streams": {}})


def test_pins_are_kept_and_let_go_and_the_own_stream_stays_open() -> None:
    calls: list[tuple[str, int]] = []

    def open_one(index: int, phase: Phase) -> Opened:
        def told(what: str) -> Any:
            return lambda: calls.append((what, index))

        return replace(made(index), keep=told("keep"), release=told("release"))

    def own_told(what: str) -> Any:
        return lambda: calls.append((what, -1))

    own = replace(made(-1), keep=own_told("keep"), release=own_told("release"))
    streams = PhaseStreams(PHASES, 1, 1, own, open_one)
    streams.keep()
    assert calls == [("keep", -1), ("keep", 0), ("keep", 2)]
    streams.on_end(None, None)  # type: ignore[arg-type]
    assert not calls[3:], "a student is published after the end"
    streams.release()
    assert calls[3:] == [("release", -1), ("release", 0), ("release", 2)]
    own.stream.next_batch()
    with pytest.raises(ConfigError, match="a closed one"):
        streams.next_batches(streams.plan.at(0))


def test_what_was_opened_is_closed_where_the_rest_cannot_be() -> None:
    first = made(0)

    def open_one(index: int, phase: Phase) -> Opened:
        if index:
            raise MismatchError("cache", "a", "b", "c")
        return first

    with pytest.raises(MismatchError):
        PhaseStreams(PHASES, 1, 1, made(-1), open_one)
    with pytest.raises(ConfigError, match="a closed one"):
        first.stream.next_batch()
