"""Rows shared out among servers that are functions: which server gets what, and what becomes of
failures. No HTTP here."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from stillroom.cache import server_run
from stillroom.cache.errors import CorruptError, MismatchError, NumericsError, StorageError
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_http import Trouble
from stillroom.cache.server_protocol import damaged
from stillroom.cache.server_run import Counts, ServerRun
from stillroom.cache.teacher import ScoreRow

REFUSED = Trouble("ConnectError: refused", by_request=False)
FAILED = Trouble("status 500", by_request=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long before a server is tried again."""
    monkeypatch.setattr(server_run, "WAIT_S", (0.001, 0.004))


@dataclass(eq=False)
class Link:
    """A server: what it does with the n-th connection and with each row."""

    url: str
    on_connect: Callable[[int], None] = lambda _: None
    on_row: Callable[[str, int], None] = lambda row, count: None
    """Given the row and how often this server was asked for it."""
    connects: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    most_tokens: int = 0
    most_requests: int = 0
    requests: int = 0

    async def connect(self) -> None:
        """Check it."""
        await asyncio.sleep(0)
        self.connects += 1
        self.on_connect(self.connects)

    async def score(self, row: ScoreRow, name: str) -> str:
        """Take a few turns of the loop, and answer."""
        self.asked[name] += 1
        self.tokens, self.requests = self.tokens + len(row.token), self.requests + 1
        self.most_tokens = max(self.most_tokens, self.tokens)
        self.most_requests = max(self.most_requests, self.requests)
        for _ in range(3):
            await asyncio.sleep(0)
        self.tokens, self.requests = self.tokens - len(row.token), self.requests - 1
        self.on_row(name, self.asked[name])
        return f"{self.url} {name}"


def raises(error: Exception, times: float = float("inf")) -> Callable[[int], None]:
    """Fails that often."""

    def fail(count: int) -> None:
        if count <= times:
            raise error

    return fail


def rows_of(*lengths: int) -> list[ScoreRow]:
    """Rows of these lengths."""
    return [ScoreRow(np.arange(n, dtype=np.uint32), np.arange(1, n)) for n in lengths]


def share_out(
    links: list[Link], rows: list[ScoreRow], counts: Counts | None = None, **config: Any
) -> dict[int, str]:
    """Who scored what; each row once."""
    found: list[tuple[int, str]] = []
    make_run: Any = ServerRun

    async def run() -> None:
        settings = ServerConfig(**config)
        shared = make_run(
            links,
            settings,
            lambda link: link.connect(),
            lambda link, row, name: link.score(row, name),
            found.append,
            Counts() if counts is None else counts,
        )
        await shared.run(rows)

    asyncio.run(run())
    assert len(dict(found)) == len(found)
    return dict(found)


def test_all_servers_work_and_each_row_is_scored_once() -> None:
    links = [Link("a"), Link("b"), Link("c")]
    found = share_out(links, rows_of(*range(2, 60)), max_tokens_in_flight=100)
    assert sorted(found) == list(range(58))
    assert sum(sum(link.asked.values()) for link in links) == 58
    assert all(link.asked for link in links)
    assert [link.connects for link in links] == [1, 1, 1]


def test_few_rows_are_for_all_servers_too() -> None:
    links = [Link("a"), Link("b"), Link("c")]
    share_out(links, rows_of(*[10] * 6))
    assert [sum(link.asked.values()) for link in links] == [2, 2, 2]


def test_the_share_of_a_server_that_never_connects_is_not_kept_for_it() -> None:
    link = Link("a")
    assert len(share_out([link, Link("b", raises(REFUSED))], rows_of(*[10] * 6))) == 6


def test_tokens_in_flight_are_bounded_and_a_longer_row_goes_alone() -> None:
    link = Link("a")
    share_out([link], rows_of(*[10] * 30), max_tokens_in_flight=45)
    assert (link.most_tokens, link.most_requests) == (40, 4)
    link = Link("a")
    share_out([link], rows_of(*[10] * 30, 200, 46), max_tokens_in_flight=45)
    assert link.most_tokens == 200


def test_requests_are_bounded_too() -> None:
    link = Link("a")
    share_out([link], rows_of(*[2] * 500))
    assert link.most_requests == server_run.MOST_REQUESTS


def test_the_longest_rows_go_first() -> None:
    link = Link("a")
    share_out([link], rows_of(3, 9, 5), max_tokens_in_flight=1)
    assert list(link.asked) == ["row 1", "row 2", "row 0"]


def test_a_slow_server_gets_fewer_rows() -> None:
    class Slow(Link):
        async def score(self, row: ScoreRow, name: str) -> str:
            for _ in range(30):
                await asyncio.sleep(0)
            return await super().score(row, name)

    slow, quick = Slow("slow"), Link("quick")
    share_out([slow, quick], rows_of(*[10] * 60), max_tokens_in_flight=20)
    assert 0 < sum(slow.asked.values()) < sum(quick.asked.values()) / 2


@pytest.mark.parametrize("trouble", [FAILED, REFUSED], ids=["failed", "refused"])
def test_a_row_that_fails_is_scored_by_whoever_is_free(
    trouble: Trouble, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(row: str, count: int) -> None:
        if row in ("row 3", "row 5") and count == 1:
            raise trouble

    links, counts = [Link("a", on_row=fail), Link("b", on_row=fail)], Counts()
    found = share_out(links, rows_of(*[10] * 20), counts, max_tokens_in_flight=30)
    assert sorted(found) == list(range(20))
    assert 2 <= counts.retries <= 4
    assert counts.tokens_in_flight == counts.servers == 0
    assert sum(link.connects for link in links) > 2, "a failure is followed by another check"
    assert f"is left aside: {trouble}" in capfd.readouterr().err


def test_a_server_that_is_down_is_tried_again(capfd: pytest.CaptureFixture[str]) -> None:
    held = asyncio.Event()

    class Waits(Link):
        async def score(self, row: ScoreRow, name: str) -> str:
            await held.wait()
            return await super().score(row, name)

    class Frees(Link):
        async def score(self, row: ScoreRow, name: str) -> str:
            held.set()
            return await super().score(row, name)

    late = Frees("late", raises(REFUSED, 6))
    found = share_out([Waits("early"), late], rows_of(*[10] * 8), max_tokens_in_flight=20)
    assert sorted(found) == list(range(8))
    assert late.connects == 7
    assert capfd.readouterr().err.count("late is left aside") == 1


def test_patience_ends_with_all_servers_named() -> None:
    links = [Link("a", raises(REFUSED)), Link("b", raises(FAILED))]
    with pytest.raises(StorageError, match=r"\(a: ConnectError: refused; b: status 500\)"):
        share_out(links, rows_of(5), patience_s=0)
    with pytest.raises(StorageError, match=r"an answer within 0\.05 s"):
        share_out(links, rows_of(5), patience_s=0.05)
    assert links[0].connects > 3


def test_servers_that_connect_and_then_refuse_every_row_are_no_answer() -> None:
    busy = Trouble("status 429", by_request=False)

    def fail(row: str, count: int) -> None:
        raise busy

    with pytest.raises(StorageError, match=r"an answer within 0\.05 s"):
        share_out([Link("a", on_row=fail)], rows_of(5), patience_s=0.05)


def test_patience_is_not_spent_while_a_server_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that takes all of the time that there is for one is made again, as often as any."""
    now = 0.0

    class Watch:
        def __init__(self) -> None:
            self.start = now

        def elapsed_s(self) -> float:
            return now - self.start

    def time_out(row: str, count: int) -> None:
        nonlocal now
        now += 600
        raise Trouble("no answer in 600 s", by_request=True)

    monkeypatch.setattr(server_run, "Stopwatch", Watch)
    link = Link("a", on_row=time_out)
    with pytest.raises(StorageError, match=r"^row 0, a: .*5 failures, .*no answer in 600 s"):
        share_out([link], rows_of(5))
    assert link.connects == server_run.TRIES


def test_a_row_that_no_server_can_bear_is_given_up_by_name() -> None:
    def fail(row: str, count: int) -> None:
        if row == "row 1":
            raise FAILED

    links = [Link("a", on_row=fail), Link("b", on_row=fail)]
    with pytest.raises(StorageError, match=r"^row 1, [ab]: .*5 failures, the last.*status 500"):
        share_out(links, rows_of(*[10] * 4))
    assert sum(link.asked["row 1"] for link in links) == server_run.TRIES


def test_a_damaged_answer_is_asked_for_once_more_elsewhere() -> None:
    def spoil(row: str, count: int) -> None:
        raise damaged(f"{row}, a", "JSON", "none")

    links = [Link("a", on_row=spoil), Link("b")]
    found = share_out(links, rows_of(*[10] * 6), max_tokens_in_flight=20)
    assert sorted(found) == list(range(6))
    assert set(links[0].asked.values()) == {1}
    with pytest.raises(CorruptError, match=r"^row \d, a: expected JSON"):
        share_out([Link("a", on_row=spoil)], rows_of(*[10] * 6))


def test_a_damaged_answer_to_a_check_is_asked_for_once_more() -> None:
    error = damaged("a", "JSON", "none")
    link = Link("a", raises(error, 1))
    assert sorted(share_out([link], rows_of(5, 6))) == [0, 1]
    assert link.connects == 2
    with pytest.raises(CorruptError, match=r"^a: expected JSON"):
        share_out([Link("a", raises(error))], rows_of(5))


@pytest.mark.parametrize("error", [NumericsError, MismatchError])
def test_what_no_other_try_can_mend_ends_the_run(error: type[Exception]) -> None:
    def fail(row: str, count: int) -> None:
        if row == "row 1":
            raise error("row 1", "x", "y", "z")

    links = [Link("a", on_row=fail), Link("b", on_row=fail)]
    with pytest.raises(error, match=r"^row 1: expected x"):
        share_out(links, rows_of(*[10] * 4))
    assert sum(link.asked["row 1"] for link in links) == 1
    with pytest.raises(error):
        share_out([Link("a"), Link("b", raises(error("b", "x", "y", "z")))], rows_of(*[10] * 400))


def test_without_rows_the_first_connection_is_enough() -> None:
    links = [Link("a", raises(REFUSED)), Link("b")]
    assert share_out(links, [], patience_s=0) == {}
    assert links[1].connects == 1
