"""A check that a stream resumes anywhere: its states, restored in a new process and with other
settings, are followed by what the unbroken run gave, and a late state costs no more than an early
one.

    check_resume(StoredStream(sources=(source,), config=config), steps=20)
    check_cost(StoredStream(sources=(source,), config=config))

Both raise AssertionError, which names the step and the field; pytest and torch are not needed.
"""

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillroom.cache.testing_shard import expect
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import StoredSource
from stillroom.replay.follow import agree_alone
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing_compare import compare, num_rows
from stillroom.replay.testing_record import Record, record

State = dict[str, Any]
TIMEOUT_S = 600
CHILD = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    sys.path.extend(pickle.load(file))
    function, arguments = pickle.load(file)
result = function(*arguments)
with open(sys.argv[2], "wb") as file:
    pickle.dump(result, file)
"""


@dataclass(frozen=True, kw_only=True)
class StoredStream:
    """A stream, before it is opened; it travels to other processes. Derive from it to open another
    kind of stream."""

    sources: tuple[StoredSource, ...]
    config: StreamConfig
    one_row: bool = False

    def open(self, rank: int = 0, world: int = 1, **changes: Any) -> ReplayStream:
        """Open it for one rank, with other settings. Each rank looks for newer commits by itself,
        so that nobody should write to the caches."""
        return ReplayStream(
            [source.open() for source in self.sources],
            replace(self.config, **changes),
            rank=rank,
            world=world,
            one_row=self.one_row,
            agree=agree_alone,
        )


@dataclass(frozen=True, slots=True)
class Variant:
    """How states are restored."""

    world: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `StreamConfig` that are other than in the run."""


def variants_of(config: StreamConfig) -> list[Variant]:
    """The ones that are tried if nothing else is said."""
    units = config.batch_rows // config.group_rows
    half, third = (max(1, units // n) * config.group_rows for n in (2, 3))
    return [
        Variant(),
        *(Variant(world) for world in (2, 3, 4)),
        Variant(changes={"batch_rows": half}),
        Variant(3, {"batch_rows": third}),
        Variant(changes={"threads": 1}),
        Variant(changes={"threads": 3, "cached_bytes": 1}),
        Variant(2, {"ahead_bytes": 1}),
    ]


def check_resume(
    stream: StoredStream, steps: int, variants: Sequence[Variant] | None = None
) -> None:
    """Save the state before every step of a run, restore all of them in a new process, the last one
    first, and compare what follows each, up to the run's end.

    With the same world and batch every byte of every array must be the same. On more ranks each
    step must have the same rows with the same values, each on one rank, and all ranks as many
    micro-batches. With another batch the rows must follow in the same order.

    Args:
        stream: what to open.
        steps: of the run; its square is how many are taken.
        variants: how states are restored; None for `variants_of`.

    Raises:
        AssertionError: something differs, or a state cannot be restored.
    """
    states, expected = _run(stream, steps)
    variants = variants_of(stream.config) if variants is None else variants
    restored = in_new_process(_restore_all, stream, variants, states, list(map(num_rows, expected)))
    for variant, of_variant in zip(variants, restored, strict=True):
        for step, found in enumerate(of_variant):
            what = f"{variant}, restored before step {step}"
            compare(expected[step:], found, variant.changes, stream.config.last_batch, what)


def _run(stream: StoredStream, steps: int) -> tuple[list[State], list[Record]]:
    states, records = [], []
    with stream.open() as opened:
        for _ in range(steps):
            states.append(json.loads(json.dumps(opened.state_dict())))
            records.append(record(opened.next_batch()))
    return states, records


def _restore_all(
    stream: StoredStream, variants: Sequence[Variant], states: Sequence[State], rows: Sequence[int]
) -> list[list[list[list[Record]]]]:
    """By variant, state, step from there on, and rank. The last state comes first, so that whatever
    one leaves behind is seen in the next."""
    found = []
    for variant in variants:
        steps = range(len(states) - 1, -1, -1)
        late = [_restore(stream, variant, states[step], sum(rows[step:])) for step in steps]
        found.append(late[::-1])
    return found


def _restore(stream: StoredStream, variant: Variant, state: State, rows: int) -> list[list[Record]]:
    ranks = [stream.open(rank, variant.world, **variant.changes) for rank in range(variant.world)]
    found: list[list[Record]] = []
    for opened in ranks:
        opened.load_state_dict(state)
    while rows > 0:
        found.append([record(opened.next_batch()) for opened in ranks])
        rows -= num_rows(found[-1][0])
    for opened in ranks:
        opened.close()
    return found


def in_new_process(function: Any, *arguments: Any) -> Any:
    """What a function of a module gives when a fresh interpreter calls it.

    Raises:
        AssertionError: it raised; has the end of the trace.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job"), Path(folder, "result")
        job.write_bytes(pickle.dumps(sys.path) + pickle.dumps((function, arguments)))
        command = [sys.executable, "-c", CHILD, str(job), str(result)]
        ended = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
        trace = ended.stderr.decode(errors="replace")[-2000:]
        expect(ended.returncode == 0, f"a new process failed: {trace}")
        return pickle.loads(result.read_bytes())


def check_cost(stream: StoredStream, steps: int = 8, late: int = 1_000_000) -> None:
    """See that a late step is restored with as little work as an early one: in function calls of
    the thread that restores it and takes a batch, which plans all that is read.

    Args:
        stream: what to open.
        steps: early ones, of which the dearest counts.
        late: how many steps, and epochs, later each is tried again.

    Raises:
        AssertionError: a late one takes over twice the calls.
    """
    states, _ = _run(stream, steps)
    moved = [_later(stream, state, late) for state in states]
    calls = in_new_process(_num_calls, stream, [*states, *moved])
    most = max(calls[:steps])
    for step, found in enumerate(calls[steps:], late):
        what = f"restoring step {step} takes {found} calls"
        expect(found <= 2 * most, f"{what}, one of the first {steps} {most} at most")


def _later(stream: StoredStream, state: State, late: int) -> State:
    units = stream.config.batch_rows // stream.config.group_rows
    sources = []
    with stream.open() as opened:
        for feed, source in zip(opened.feeds, state["sources"], strict=True):
            epoch = source["epoch"] + late
            first = min(source["first"], feed.units_in(epoch) - 1)
            sources.append({**source, "epoch": epoch, "first": first})
    moved = {"step": state["step"] + late, "drawn": state["drawn"] + late * units}
    return {**state, **moved, "sources": sources}


def _num_calls(stream: StoredStream, states: Sequence[State]) -> list[int]:
    return [_num_calls_of(stream, state) for state in states]


def _num_calls_of(stream: StoredStream, state: State) -> int:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with stream.open(ahead_bytes=1, follow_every_steps=0) as opened:
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            opened.load_state_dict(state)
            opened.next_batch()
        finally:
            sys.setprofile(before)
    return calls
