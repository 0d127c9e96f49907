"""Streams that do not resume as they must, each in its own way."""

from dataclasses import dataclass, replace
from typing import Any

from stillroom.replay.batch import Batch
from stillroom.replay.stream import ReplayStream
from stillroom.replay.testing import StoredStream


class Late(ReplayStream):
    """Goes on a step too late, from one state on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, and pass over a step."""
        super().load_state_dict(state)
        self.skip(state["step"] >= 2)


class Replaying(ReplayStream):
    """Finds its place by passing over all steps before it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, in as many steps as were taken."""
        super().load_state_dict(state)
        for _ in range(state["step"]):
            self.steps_per_epoch  # noqa: B018


class Forgetful(ReplayStream):
    """Gives a wrong value after it was restored."""

    restored = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, and remember."""
        super().load_state_dict(state)
        self.restored = True

    def next_batch(self) -> Batch:
        """With another first value."""
        batch = super().next_batch()
        micro = batch.micro_batches[0]
        if self.restored and micro is not None:
            micro.tail_logprob[0] += 1
        return batch


class Reordered(ReplayStream):
    """Lays its micro-batches in another order after it was restored."""

    restored = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, and remember."""
        super().load_state_dict(state)
        self.restored = True

    def next_batch(self) -> Batch:
        """Backwards."""
        batch = super().next_batch()
        if not self.restored:
            return batch
        return replace(batch, micro_batches=batch.micro_batches[::-1])


class Deaf(ReplayStream):
    """Refuses every state but the first."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load."""
        if state["step"]:
            raise RuntimeError("no such place")
        super().load_state_dict(state)


class OnOneRank(ReplayStream):
    """Every rank holds all rows."""

    def __init__(self, *arguments: Any, rank: int, world: int, **others: Any) -> None:
        """Open as if alone."""
        super().__init__(*arguments, rank=0, world=1, **others)


KINDS = {kind.__name__: kind for kind in (Late, Replaying, Forgetful, Reordered, Deaf, OnOneRank)}


@dataclass(frozen=True, kw_only=True)
class Broken(StoredStream):
    """A stream of one of these kinds, before it is opened."""

    kind: str

    def open(self, rank: int = 0, world: int = 1, **changes: Any) -> ReplayStream:
        """Open it."""
        return KINDS[self.kind](
            [source.open() for source in self.sources],
            replace(self.config, **changes),
            rank=rank,
            world=world,
        )
