"""The stream: rows of one or several caches in replay order, as packed batches, for one rank of any
number. Threads read ahead of it.

Its state is a small plain dict; a stream made from it goes on with the batch that would have come
next, also on another number of ranks or with another batch size.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from stillroom.cache.errors import (
    ConfigError,
    ForkedError,
    InputError,
    StillroomError,
    StorageError,
)
from stillroom.cache.recycler import Empty, Recycler
from stillroom.replay.batch import Batch
from stillroom.replay.config import AT_EPOCH_END, StreamConfig
from stillroom.replay.feed import Feed, Source
from stillroom.replay.follow import Agree, agree_among, check_same_on_ranks, newest_snapshots
from stillroom.replay.mix import shares
from stillroom.replay.place import Place, steps_in
from stillroom.replay.prefetch import Prefetch
from stillroom.replay.state import History, check_settings, check_state, snapshots_in, state_of
from stillroom.replay.step import Planner, Position, Step
from stillroom.replay.stream_checks import check_batch, check_ranks, check_sources, check_stride


class ReplayStream:
    """Batches of one rank. One thread uses it, in the process that made it.

    Args:
        sources: the cache, or several that are mixed.
        config: sizes, order, which rows.
        rank: this process, 0 to world - 1.
        world: number of processes.
        one_row: give each micro-batch one row (or one group with a shared prompt), for students
            whose packed rows would see one another.
        vocab_size: tokens of the student, if a cache of another vocabulary is to be refused.
        empty: allocates arrays of batches, for memory that a GPU copies from; called by several
            threads. None uses that of batches that nobody holds any more.
        agree: how ranks agree on newer snapshots; None for torch.distributed.
        stride: takes one step and passes over the next stride - 1, unread: so many streams, each
            skipped to a step of its own, share the steps.
        say: is told what is not replayed, if anything is not, and again where newer snapshots
            change that; None tells nobody.

    Raises:
        InputError: a snapshot is empty, nothing is left of it, a row is longer than a micro-batch,
            or a step is larger than an epoch.
        MismatchError: the caches do not fit each other.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        config: StreamConfig,
        *,
        rank: int = 0,
        world: int = 1,
        one_row: bool = False,
        vocab_size: int | None = None,
        empty: Empty | None = None,
        agree: Agree | None = None,
        stride: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Choose rows; none is read yet, unless a filter needs columns."""
        sources = [sources] if isinstance(sources, Source) else list(sources)
        check_ranks(rank, world)
        check_stride(stride, config)
        check_sources(sources, config, vocab_size)
        self._config, self._stride, self._world = config, stride, world
        self._one_row = one_row
        self._pid = os.getpid()
        self._follow = config.follow_every_steps
        self._agree = agree or (agree_among(world) if self._follow else None)
        self._shares = shares([source.weight for source in sources])
        self._recycler = Recycler(config.cached_bytes + (0 if empty else config.ahead_bytes))
        made = self._recycler.empty
        self._planner = Planner(
            [Feed(source, number, config, made) for number, source in enumerate(sources)],
            self._shares,
            config,
            rank,
            world,
            one_row,
        )
        check_batch(self.feeds, config)
        self._position = Position(0, 0, (Place(),) * len(sources))
        self._history = [[(0, source.snapshot.id)] for source in sources]
        self._looked_at = 0
        self._agreed: tuple[int, list[str]] | None = None
        check_same_on_ranks(self._what_ranks_share(), world)
        remote = not all(source.cache.storage.is_local for source in sources)
        threads = config.read_threads(remote)
        self._ahead = Prefetch(
            partial(_plan, self._planner, stride),
            config.cached_bytes,
            config.ahead_bytes,
            threads,
            empty or made,
        )
        self._say, self._said = say, ""
        self._tell()

    def _what_ranks_share(self) -> dict[str, Any]:
        config = self._config
        sizes: dict[str, Any] = {"batch_rows": config.batch_rows}
        sizes |= {"max_tokens": config.max_tokens}
        sizes |= {"share_prompts": bool(config.share_prompts), "world": self._world}
        sizes |= {"even_ranks": config.even_ranks, "weight_column": config.weight_column}
        sizes |= {"one_row": self._one_row, "stride": self._stride}
        return sizes | {"follow_every_steps": self._follow} | self.state_dict()

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """The sources, as they are read now."""
        return self._planner.feeds

    @property
    def snapshots(self) -> list[str]:
        """Ids of the snapshots that are read now."""
        return [feed.source.snapshot.id for feed in self.feeds]

    @property
    def missing(self) -> str:
        """What is not replayed now, for a person; empty if every row is, whole. The counts are in
        `feeds[i].selection`."""
        several = len(self.feeds) > 1
        return "; ".join(
            f"{feed.source.cache.storage.root}: {missing}" if several else missing
            for feed in self.feeds
            if (missing := feed.selection.missing)
        )

    @property
    def open_bytes(self) -> int:
        """About what the decoded blocks take that are in use at once. Where that is more than
        `cached_bytes`, blocks are decoded several times an epoch."""
        return sum(feed.open_bytes(self._world) for feed in self.feeds)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row came once; of several caches, as many as all their rows fill."""
        units = sum(feed.units_in(self._position.places[0].epoch) for feed in self.feeds)
        batch = self._config.batch_rows // self._config.group_rows
        return steps_in(units, batch, self._config.last_batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, before its next batch: a few hundred bytes, plain."""
        return state_of(self._config, self.feeds, self._shares, self._position, self._history)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state of a stream over the same snapshots and order. A stream that follows its
        caches goes to the state's snapshots.

        Raises:
            MismatchError: the state belongs to other caches, snapshots, or another order.
            CorruptError: it is not a state, or names no place in that order.
            MissingError: a snapshot that it followed is gone.
            InputError: a step is larger than that snapshot.
        """
        self._check_usable()
        followed = list(self.feeds)
        if self._follow:
            check_settings(state, self._config, followed, self._shares)
            pairs = zip(followed, snapshots_in(state), strict=True)
            followed = [_followed(feed, snapshot) for feed, snapshot in pairs]
        position, history = check_state(state, self._config, followed, self._shares)
        check_batch(followed, self._config)
        self._replace(followed, position, history)
        self._looked_at, self._agreed = -1 if position.step else 0, None

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next step's share of this rank.

        Raises:
            CorruptError: stored bytes are damaged; names the object. The stream stays before the
                step.
        """
        self._check_usable()
        self._adopt()
        batch, self._position = self._ahead.take(self._position)
        return batch

    def skip(self, steps: int) -> None:
        """Pass over steps without reading their rows. A stream that follows its caches looks for
        newer commits on the way. With `lag_half_life` this goes step by step, and finds out which
        rows each epoch on the way has."""
        self._check_usable()
        if steps < 0:
            raise ConfigError("steps to skip", "0 or more", f"{steps}", "Load a state to go back.")
        self._ahead.drop()
        for _ in range(steps if self._follow else 0):
            self._adopt()
            _, self._position = self._planner.spans(self._position)
        if not self._follow:
            self._position = self._planner.after(self._position, steps)

    def close(self) -> None:
        """End the threads and let go of memory; the stream gives nothing any more. In a fork, do
        nothing."""
        if os.getpid() == self._pid:
            self._ahead.close()
            self._recycler.clear()
            for feed in self.feeds:
                feed.close()

    def __enter__(self) -> "ReplayStream":
        """Close at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __getstate__(self) -> None:
        """Refuse: threads do not travel."""
        do = "Use replay.dataset.ReplayDataset, which opens its stream where it is iterated."
        raise ConfigError("stream", "a process of its own", "a copy of another's", do)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            do = "Start workers with spawn, or open the stream in the child."
            got = f"a fork of it, {os.getpid()}"
            raise ForkedError("stream", f"the process that made it, {self._pid}", got, do)
        if self._ahead.closed:
            raise ConfigError("stream", "an open stream", "a closed one", "Open another one.")

    def _due(self, at: Position) -> bool:
        """Whether newer commits are looked for before the step at a position."""
        if not self._follow or at.step == self._looked_at:
            return False
        return at.epoch_ended if self._follow == AT_EPOCH_END else at.step % self._follow == 0

    def _adopt(self) -> None:
        """Take up newer snapshots, if it is time to look and there are any.

        What a rank may meet alone, such as a failing storage or a shard that it does not find, has
        its next call open what was agreed without asking the others, who went on. What follows from
        the snapshot and the settings alone is an error on all ranks, and they ask anew."""
        if not self._due(self._position):
            return
        assert self._agree is not None
        at = self._position.step
        if self._agreed is None or self._agreed[0] != at:
            caches = [feed.source.cache for feed in self.feeds]
            self._agreed = at, self._agree(lambda: newest_snapshots(caches))
        try:
            self._take_up(self._agreed[1])
        except StillroomError as error:
            alone = self._world == 1 and not isinstance(error, StorageError)
            if alone or isinstance(error, InputError):
                self._agreed = None
            raise

    def _take_up(self, newest: Sequence[str]) -> None:
        """Read these snapshots from now on, in a new epoch where they are others."""
        at, feeds, places = self._position.step, list(self.feeds), list(self._position.places)
        history = list(self._history)
        for i, (feed, snapshot) in enumerate(zip(self.feeds, newest, strict=True)):
            if snapshot != feed.source.snapshot.id:
                feeds[i] = _followed(feed, snapshot)
                places[i] = Place(places[i].epoch + (places[i].first > 0), 0)
                history[i] = [*history[i], (at, snapshot)]
        check_batch(feeds, self._config)
        self._looked_at = at
        if tuple(feeds) != self.feeds:
            self._replace(feeds, replace(self._position, places=tuple(places)), history)

    def _replace(
        self, feeds: Sequence[Feed], position: Position, history: Sequence[History]
    ) -> None:
        """Read other snapshots from now on."""
        self._ahead.drop()
        self._planner.read_from(feeds)
        self._position, self._history = position, list(history)
        self._ahead.forget_all_but(self.feeds)
        self._tell()

    def _tell(self) -> None:
        """Say what is not replayed, where that is not what was said last."""
        missing = self.missing
        if self._say is not None and missing != self._said:
            self._say(missing or "every row is replayed now")
        self._said = missing


def _plan(planner: Planner, stride: int, at: Position) -> tuple[Step, Position]:
    """The step at a position, with the snapshots of now, and the position after those that are
    passed over."""
    step, after = planner.next(at)
    return step, planner.after(after, stride - 1) if stride > 1 else after


def _followed(feed: Feed, snapshot: str) -> Feed:
    if snapshot == feed.source.snapshot.id:
        return feed
    return feed.with_snapshot(feed.source.cache.open_snapshot(snapshot))
