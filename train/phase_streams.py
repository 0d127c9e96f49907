"""The data of a run in phases: which stream the batches of a step come from, what is minimised on
them, and where all streams stand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stillroom.cache.errors import CorruptError, MismatchError
from stillroom.cache.identity import Identity
from stillroom.replay.batch import Batch
from stillroom.replay.stream import ReplayStream
from stillroom.train.callbacks import Callback
from stillroom.train.crossed import check_crossed
from stillroom.train.phases import Phase, PhasePlan, PhaseStep, sources_of
from stillroom.train.supervised import SupervisedStream

if TYPE_CHECKING:
    from stillroom.train.replay_loss import ReplayLoss
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer

WHERE = "state of the phases"
DO = "Resume from another checkpoint, or begin anew under another run name."


def _nothing() -> None:
    """Nothing to do: the rows of a dataset are in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """Data that phases are trained on."""

    stream: ReplayStream | SupervisedStream
    identity: Identity
    """Of the cache; for a dataset, of one at temperature 1 without extra ids."""
    keep: Callable[[], None] = _nothing
    """Renews the pin of what the stream reads."""
    release: Callable[[], None] = _nothing
    """Lets go of it."""


class PhaseStreams(Callback):
    """The data of all phases; those on the same data share a stream, which goes on from phase to
    phase and from cycle to cycle. A checkpoint keeps where streams stand, as of a callback.

    Args:
        phases: the list; one at least.
        cycles: times that it is gone through.
        batches_per_step: that are accumulated.
        own: the run's own cache, whose state and end are the caller's.
        opened: opens the data of a phase on another cache or a dataset, at this index of the list;
            called once for each.
        resumed: the state that is to be gone on from: its phases are as long as they were when the
            run began, though its cache has grown meanwhile.

    Raises:
        MismatchError: it is of other phases.
        CorruptError: it is not a state.
    """

    name = "phases"

    def __init__(
        self,
        phases: Sequence[Phase],
        cycles: int,
        batches_per_step: int,
        own: Opened,
        opened: Callable[[int, Phase], Opened],
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        """Open every stream; none reads ahead yet."""
        self.phases, self.own, self._sources = tuple(phases), own, sources_of(phases)
        self._data: dict[int, Opened] = {}
        begun = None if resumed is None else _batches_of(resumed)
        try:
            for i in dict.fromkeys(self._sources):
                replays_own = phases[i].supervised is None and phases[i].root is None
                self._data[i] = own if replays_own else opened(i, phases[i])
            batches = begun or self._lengths(batches_per_step)
            if len(batches) != len(self.phases):
                raise MismatchError(WHERE, f"{len(self.phases)} phases", f"{len(batches)}", DO)
            self.plan = PhasePlan(batches, batches_per_step, cycles)
        except BaseException:
            self.close()
            raise

    def _lengths(self, per_step: int) -> tuple[int, ...]:
        return tuple(
            phase.batches(self._data[i].stream.steps_per_epoch, per_step)
            for phase, i in zip(self.phases, self._sources, strict=True)
        )

    def data(self, phase: int) -> Opened:
        """What the phase of an index is trained on."""
        return self._data[self._sources[phase]]

    def losses(self, own: "ReplayLoss") -> list["ReplayLoss"]:
        """Each phase's loss: the run's own, on the phase's data and with its objective.

        Raises:
            MismatchError: an objective needs extra ids that a cache does not hold, or takes
                cross-entropy on none of the rows.
        """
        return [self._loss(own, i, phase) for i, phase in enumerate(self.phases)]

    def _loss(self, own: "ReplayLoss", index: int, phase: Phase) -> "ReplayLoss":
        data, objective = self.data(index), phase.objective_of(own.objective)
        if isinstance(data.stream, ReplayStream):
            check_crossed(data.stream.feeds, objective)
        return replace(own, identity=data.identity, objective=objective)

    def next_batches(self, place: PhaseStep) -> list[Batch]:
        """This rank's share of the batches of a step, which must be the one after the last."""
        stream = self.data(place.phase).stream
        return [stream.next_batch() for _ in range(place.batches)]

    def keep(self) -> None:
        """Renew the pins of all that is read."""
        for data in (self.own, *self._others.values()):
            data.keep()

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Close all streams but the run's own."""
        self.close()

    def release(self) -> None:
        """Let go of all that is read."""
        for data in (self.own, *self._others.values()):
            data.release()

    def state_dict(self) -> dict[str, Any]:
        """The plan, and where the streams stand but for that of the run's own cache: plain."""
        streams = {str(i): data.stream.state_dict() for i, data in self._others.items()}
        return {"batches": list(self.plan.batches), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of a run with the same phases of the same lengths.

        Raises:
            MismatchError: phases, rows or order are others.
            CorruptError: it is not a state.
        """
        batches, streams = _batches_of(state), state["streams"]
        if batches != self.plan.batches:
            expected = f"phases of {list(self.plan.batches)} batches"
            raise MismatchError(WHERE, expected, f"{list(batches)!r:.60}", DO)
        if streams.keys() != set(map(str, self._others)):
            expected = f"streams of phases {sorted(self._others)}"
            raise MismatchError(WHERE, expected, f"{sorted(streams)!r:.60}", DO)
        for i, data in self._others.items():
            data.stream.load_state_dict(streams[str(i)])

    def close(self) -> None:
        """Close all streams but that of the run's own cache."""
        for data in self._others.values():
            data.stream.close()

    @property
    def _others(self) -> dict[int, Opened]:
        return {i: data for i, data in self._data.items() if data is not self.own}


def _batches_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Batches of each phase, as a state says."""
    if state.keys() == {"batches", "streams"} and isinstance(state["streams"], dict):
        batches = state["batches"]
        if (
            isinstance(batches, list)
            and batches
            and all(type(n) is int and n >= 1 for n in batches)
        ):
            return tuple(batches)
    raise CorruptError(WHERE, "what state_dict() gave", f"{state!r:.60}", DO)
