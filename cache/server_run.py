"""Rows shared out among servers: each takes the next one when it has room, a row that got no answer
goes to whoever is free, and a server that fails is left aside and tried again."""

import asyncio
import random
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stillroom.cache.clock import Stopwatch
from stillroom.cache.errors import CorruptError, StillroomError, StorageError
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_http import Trouble
from stillroom.cache.server_link import ServerLink
from stillroom.cache.teacher import RowScores, ScoreRow

MOST_REQUESTS = 128
"""At one server at once, however short they are."""
TRIES = 5
"""Failures after which a row is given up: it may be what the servers cannot bear."""
WAIT_S = (0.5, 30.0)
"""A server that fails is tried again after the first, then less and less often, down to the second.
"""

Scorer = Callable[[ServerLink, ScoreRow, str], Awaitable[RowScores]]


@dataclass(slots=True)
class Counts:
    """What goes on, for those who watch."""

    retries: int = 0
    tokens_in_flight: int = 0
    servers: int = 0
    """That answer."""


@dataclass(slots=True, eq=False)
class _Row:
    index: int
    row: ScoreRow
    failures: int = 0
    damaged_by: "_Server | None" = None

    @property
    def tokens(self) -> int:
        return len(self.row.token)


@dataclass(slots=True, eq=False)
class _Server:
    link: ServerLink
    state: Literal["trying", "live", "aside"] = "trying"
    tokens: int = 0
    requests: int = 0
    trouble: Trouble | None = None
    waits: Iterator[float] = field(default_factory=lambda: _waits())
    warned: bool = False
    damaged: bool = False
    """Whether an answer to a check of it was."""


class ServerRun:
    """One sharing out.

    Args:
        links: the servers.
        config: how they are asked.
        connect: checks a server before its first row, and after each failure.
        score: has a server score a row, named as in messages.
        deliver: takes each row's index and scores, once.
        counts: kept up to date.
    """

    def __init__(
        self,
        links: Sequence[ServerLink],
        config: ServerConfig,
        connect: Callable[[ServerLink], Awaitable[None]],
        score: Scorer,
        deliver: Callable[[tuple[int, RowScores]], None],
        counts: Counts,
    ) -> None:
        """Nothing is asked yet."""
        self._servers = [_Server(link) for link in links]
        self._config, self._connect, self._score = config, connect, score
        self._deliver, self._counts = deliver, counts
        self._pending: deque[_Row] = deque()
        self._left = self._tokens_left = 0
        self._down: Stopwatch | None = None
        self._down_s = 0.0
        """Since a row was scored, all servers were aside for so long, before `_down`."""
        self._changed = asyncio.Condition()
        self._finished = asyncio.Event()

    async def run(self, rows: Sequence[ScoreRow]) -> None:
        """Have all rows scored, the longest first; with none, wait until one server is connected.

        Raises:
            StorageError: no server answered for as long as the settings say, or a row got no answer
                from servers that did.
            StillroomError: as `connect` and `score`.
        """
        works = [_Row(i, row) for i, row in enumerate(rows)]
        self._pending = deque(sorted(works, key=lambda work: -work.tokens))
        self._left, self._tokens_left = len(works), sum(work.tokens for work in works)
        failed: StillroomError | None = None
        try:
            async with asyncio.TaskGroup() as self._group:
                serving = [self._group.create_task(self._serve(s)) for s in self._servers]
                await self._finished.wait()
                for task in serving:
                    task.cancel()
        except* StillroomError as errors:
            failed = next(e for e in errors.exceptions if isinstance(e, StillroomError))
        finally:
            self._counts.tokens_in_flight = self._counts.servers = 0
        if failed is not None:
            raise failed

    async def _serve(self, server: _Server) -> None:
        """Keep one server at work until the run ends."""
        while True:
            server.state = "trying"
            try:
                await self._connect(server.link)
            except Trouble as trouble:
                await self._leave_aside(server, trouble)
                continue
            except CorruptError as error:
                if server.damaged:
                    raise
                server.damaged = True
                await self._leave_aside(server, Trouble(str(error), by_request=False))
                continue
            server.state, server.trouble = "live", None
            if self._down is not None:
                self._down_s, self._down = self._down_s + self._down.elapsed_s(), None
            self._counts.servers += 1
            if not self._left:
                self._finished.set()
            failure = await self._feed(server)
            self._counts.servers -= 1
            await self._leave_aside(server, failure)

    async def _feed(self, server: _Server) -> Trouble:
        """Give a server rows until one fails, and wait for those that it still works on."""
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: server.trouble is not None or self._next(server) is not None
                )
                work = self._next(server)
                if server.trouble is not None or work is None:
                    break
                self._pending.remove(work)
                self._count(server, work, 1)
            self._group.create_task(self._ask(server, work))
        async with self._changed:
            await self._changed.wait_for(lambda: server.requests == 0)
        return server.trouble or Trouble("left aside", by_request=False)

    def _next(self, server: _Server) -> _Row | None:
        """The longest row that waits, if there is room: a server gets no more than its share of
        what is left, of which those that are being checked have one too. A row that a server gave a
        damaged answer for is for others, while there are any."""
        sharing = sum(s.state != "aside" for s in self._servers)
        most = min(self._config.max_tokens_in_flight, self._tokens_left / sharing)
        others = any(s.state == "live" for s in self._servers if s is not server)
        for work in self._pending:
            if work.damaged_by is server and others:
                continue
            room = server.tokens + work.tokens <= most
            fits = server.requests < MOST_REQUESTS and (room or not server.requests)
            return work if fits else None
        return None

    async def _ask(self, server: _Server, work: _Row) -> None:
        try:
            scores = await self._score(server.link, work.row, f"row {work.index}")
        except Trouble as trouble:
            self._take_back(server, work, trouble)
        except CorruptError:
            if work.damaged_by is not None:
                raise
            work.damaged_by = server
            self._counts.retries += 1
            self._pending.appendleft(work)
        else:
            self._deliver((work.index, scores))
            self._down_s, server.waits, server.warned = 0.0, _waits(), False
            self._left, self._tokens_left = self._left - 1, self._tokens_left - work.tokens
            if not self._left:
                self._finished.set()
        finally:
            self._count(server, work, -1)
        async with self._changed:
            self._changed.notify_all()

    def _take_back(self, server: _Server, work: _Row, trouble: Trouble) -> None:
        """Let a row wait again, and its server rest."""
        work.failures += trouble.by_request
        if work.failures >= TRIES:
            raise StorageError(
                f"row {work.index}, {server.link.url}",
                "scores",
                f"{TRIES} failures, the last of them {trouble}",
                "Look into the servers' logs: this row, or one sent with it, may be too much.",
            ) from trouble
        self._counts.retries += 1
        self._pending.appendleft(work)
        server.trouble = trouble

    def _count(self, server: _Server, work: _Row, sign: int) -> None:
        server.requests += sign
        server.tokens += sign * work.tokens
        self._counts.tokens_in_flight += sign * work.tokens

    async def _leave_aside(self, server: _Server, trouble: Trouble) -> None:
        """Wait before a server is tried again, unless none answers and patience is at its end."""
        server.state, server.trouble = "aside", trouble
        if not server.warned:
            print(f"  warning: {server.link.url} is left aside: {trouble}", file=sys.stderr)
        server.warned = True
        async with self._changed:
            self._changed.notify_all()  # rows that were kept for others may be for this one now
        wait = next(server.waits)
        if all(s.state == "aside" for s in self._servers):
            self._down = self._down or Stopwatch()
            patience = self._config.patience_s - self._down_s - self._down.elapsed_s()
            if patience <= 0:
                raise self._nobody()
            wait = min(wait, patience)
        await asyncio.sleep(wait)

    def _nobody(self) -> StorageError:
        reasons = "; ".join(f"{s.link.url}: {s.trouble}" for s in self._servers)
        return StorageError(
            "the teacher's servers",
            f"an answer within {self._config.patience_s:g} s",
            f"none ({reasons})",
            "Start them, or check teacher.server.urls.",
        )


def _waits() -> Iterator[float]:
    """Seconds before each try, up to twice those before the last; drawn, so that servers and jobs
    do not move together."""
    wait, longest = WAIT_S
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(2 * wait, longest)
