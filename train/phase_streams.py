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
    """

    name = "phases"

    def __init__(
        self,
        phases: Sequence[Phase],
        cycles: int,
        batches_per_step: int,
        own: Opened,
        opened: Callable[[int, Phase], Opened],
    ) -> None:
        """Open every stream; none reads ahead yet."""
        self.phases, self.own, self._sources = tuple(phases), own, sources_of(phases)
        self._data: dict[int, Opened] = {}
        try:
            for i in dict.fromkeys(self._sources):
                replays_own = phases[i].supervised is None and phases[i].root is None
                self._data[i] = own if replays_own else opened(i, phases[i])
        except BaseException:
            self.close()
            raise
        batches = [
            phase.batches(self._data[i].stream.steps_per_epoch, batches_per_step)
            for phase, i in zip(phases, self._sources, strict=True)
        ]
        self.plan = PhasePlan(tuple(batches), batches_per_step, cycles)

    def data(self, phase: int) -> Opened:
        """What the phase of an index is trained on."""
        return self._data[self._sources[phase]]

    def losses(self, own: "ReplayLoss") -> list["ReplayLoss"]:
        """Each phase's loss: the run's own, on the phase's data and with its objective.

        Raises:
            MismatchError: an objective needs extra ids that a cache does not hold.
        """
        return [
            replace(
                own, identity=self.data(i).identity, objective=phase.objective_of(own.objective)
            )
            for i, phase in enumerate(self.phases)
        ]

    def next_batches(self, place: PhaseStep) -> list[Batch]:
        """This rank's share of the batches of a step, which must be the one after the last."""
        stream = self.data(place.phase).stream
        return [stream.next_batch() for _ in range(place.batches)]

    def keep(self) -> None:
        """Renew the pins of all that is read."""
        for data in (self.own, *self._others.values()):
            data.keep()

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Close all streams but the run's own, and let go of their pins."""
        self.close()
        for data in self._others.values():
            data.release()

    def state_dict(self) -> dict[str, Any]:
        """The plan, and where the streams stand but for that of the run's own cache: plain."""
        streams = {str(i): data.stream.state_dict() for i, data in self._others.items()}
        return {"batches": list(self.plan.batches), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of a run with the same phases. A single one may last longer or less long;
        of several, only the number of cycles may be another.

        Raises:
            MismatchError: phases, rows or order are others.
            CorruptError: it is not a state.
        """
        if state.keys() != {"batches", "streams"} or not isinstance(state["streams"], dict):
            raise CorruptError(WHERE, "what state_dict() gave", f"{state!r:.60}", DO)
        batches, streams = state["batches"], state["streams"]
        if len(self.plan.batches) > 1 and batches != list(self.plan.batches):
            expected = f"phases of {list(self.plan.batches)} batches"
            raise MismatchError(WHERE, expected, f"{batches!r:.60}", DO)
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
