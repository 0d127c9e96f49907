"""Requests: what is worth another try, what is not, and what is never printed."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from stillroom.cache.errors import ConfigError, CorruptError
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_http import Refused, Trouble, ask, open_client
from tests.cache.fake_server import FakeServer, Fault

BODY = {"prompt": [[1, 2, 3]], "prompt_logprobs": 2}
KEY = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server."""
    running = FakeServer()
    yield running
    running.close()


def asked(url: str, *, timeout_s: float = 20.0, most_bytes: int = 1 << 20) -> bytes:
    """The answer to a request for scores."""

    async def once() -> bytes:
        async with open_client(ServerConfig(timeout_s=timeout_s)) as client:
            return await ask(
                client,
                url + "/v1/completions",
                BODY,
                timeout_s=timeout_s,
                most_bytes=most_bytes,
                where="row 0",
            )

    return asyncio.run(once())


def test_an_answer_comes_whole(server: FakeServer) -> None:
    assert asked(server.url).startswith(b'{"id"')
    assert server.requests[0].authorization is None


@pytest.mark.parametrize(
    ("fault", "by_request"),
    [
        (Fault(status=408), False),
        (Fault(status=429), False),
        (Fault(status=503), False),
        (Fault(status=500), True),
        (Fault(status=502), True),
        (Fault(drop=True), True),
        (Fault(cut=True), True),
    ],
    ids=["408", "429", "503", "500", "502", "dropped", "cut"],
)
def test_trouble_is_worth_another_try(server: FakeServer, fault: Fault, by_request: bool) -> None:
    server.faults = [fault]
    with pytest.raises(Trouble) as caught:
        asked(server.url)
    assert caught.value.by_request == by_request
    assert asked(server.url)


def test_a_server_that_is_not_there_is_trouble() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(Trouble, match="ConnectError") as caught:
            asked(url)
    assert not caught.value.by_request


def test_a_server_that_says_nothing_is_trouble_in_time(server: FakeServer) -> None:
    server.hold_until = 2
    with pytest.raises(Trouble, match=r"^no answer in 0\.05 s$"):
        asked(server.url, timeout_s=0.05)
    assert asked(server.url)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 422])
def test_a_refusal_is_not(server: FakeServer, status: int) -> None:
    server.faults = [Fault(status=status, text="because\n of\x1b[31m this" + "." * 9000)]
    with pytest.raises(Refused, match=rf"^status {status}: because of\?\[31m this\.+$") as caught:
        asked(server.url)
    assert len(str(caught.value)) < 400


def test_an_answer_without_end_is_refused(server: FakeServer) -> None:
    with pytest.raises(CorruptError, match=r"^row 0: expected at most 100 bytes; got more"):
        asked(server.url, most_bytes=100)


def test_the_key_is_sent_and_not_repeated(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_API_KEY", KEY)
    server.faults = [Fault(status=400, text=f"wrong key: {KEY}")]
    with pytest.raises(Refused, match=r"wrong key: \*\*\*"):
        asked(server.url)
    assert server.requests[0].authorization == f"Bearer {KEY}"
    monkeypatch.setenv("STILLROOM_API_KEY", KEY + "\n")
    with pytest.raises(ConfigError, match=r"^STILLROOM_API_KEY: ") as caught:
        asked(server.url)
    assert KEY not in str(caught.value)
