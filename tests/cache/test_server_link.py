"""One server: what it must be before it is asked for scores, and what its refusals become."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stillroom.cache.canary import canary_rows
from stillroom.cache.errors import ConfigError, CorruptError, InputError, MismatchError
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_http import open_client
from stillroom.cache.server_link import Known, ServerLink, longest_asked
from stillroom.cache.server_trl import TrlProtocol
from stillroom.cache.server_vllm import VllmProtocol
from stillroom.cache.teacher import ScoreRow, ScoreSpec
from tests.cache.fake_server import FILES, FakeServer, Fault
from tests.cache.fakes import VOCAB, FakeTeacher

ROW = ScoreRow(np.array([3, 1, 4, 1, 5], np.uint32), np.array([2, 4]))
SPEC = ScoreSpec(topk=5)


@pytest.fixture(params=["vllm", "trl"])
def protocol(request: pytest.FixtureRequest) -> str:
    """Both protocols."""
    return str(request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    """A server, of vLLM's kind unless the test takes both."""
    both = "protocol" in request.fixturenames
    running = FakeServer(request.getfixturevalue("protocol") if both else "vllm")
    yield running
    running.close()


def with_link(
    server: FakeServer,
    do: Callable[[ServerLink], Awaitable[Any]],
    known: Known | None = None,
    **config: Any,
) -> Any:
    """What comes of doing something with a server."""
    settings = ServerConfig(**{"timeout_s": 20, "protocol": server.protocol, **config})
    protocol = TrlProtocol(VOCAB) if settings.protocol == "trl" else VllmProtocol(VOCAB)

    async def run() -> Any:
        async with open_client(settings) as client:
            known_ = Known() if known is None else known
            link = ServerLink(server.url, FILES, settings, protocol, client, known_, asyncio.Lock())
            return await do(link)

    return asyncio.run(run())


def test_a_server_that_is_right_is_met(server: FakeServer, protocol: str) -> None:
    known = Known()
    with_link(server, lambda link: link.greet(128), known)
    told = protocol == "vllm"
    assert known == Known("0.32.0" if told else None, server.url, 4095 if told else None)
    assert server.scored() == []


def test_its_model_is_sent_back(server: FakeServer) -> None:
    asked: list[Any] = []

    async def greet_and_score(link: ServerLink) -> None:
        await link.greet(10)
        asked.append(link._model)
        await link.score(ROW, SPEC, "row 0")

    with_link(server, greet_and_score)
    server.models = [{"id": "adapter"}, {"id": "m", "max_model_len": None}]
    with_link(server, greet_and_score, model="m")
    assert asked == ["m", "m"]


@pytest.mark.parametrize(
    ("models", "model", "error", "message"),
    [
        ([{"id": "m"}], "n", MismatchError, "expected the model n; got m. "),
        ([{"id": "m"}, {"id": "n"}], None, ConfigError, r"one model; got m, n. .*server\.model"),
        ([{"id": "m", "max_model_len": 128}], None, ConfigError, "--max-model-len 129"),
        ([], None, CorruptError, "/v1/models: expected models by name"),
        ([{"id": 5}], None, CorruptError, "/v1/models"),
        (["m"], None, CorruptError, "/v1/models"),
        ({"m": 1}, None, CorruptError, "/v1/models"),
    ],
)
def test_a_server_that_cannot_serve_is_refused_at_once(
    server: FakeServer, models: Any, model: str | None, error: type[Exception], message: str
) -> None:
    server.models = models
    with pytest.raises(error, match=message) as caught:
        with_link(server, lambda link: link.greet(128), model=model)
    assert server.url in str(caught.value)


def test_another_version_than_the_first_ones_is_refused(server: FakeServer) -> None:
    expected = r"expected version 0\.31\.0, as http://first has; got 0\.32\.0"
    with pytest.raises(MismatchError, match=expected):
        with_link(server, lambda link: link.greet(10), Known("0.31.0", "http://first"))


@pytest.mark.parametrize("version", [None, "", "1\n2", 3])
def test_a_version_that_is_none_counts_as_not_told(server: FakeServer, version: Any) -> None:
    server.version = version
    known = Known()
    with_link(server, lambda link: link.greet(10), known)
    assert known.version is None


def test_the_wrong_protocol_is_found_at_once(server: FakeServer) -> None:
    message = r"a server that speaks trl at /health/; got status 404"
    with pytest.raises(ConfigError, match=message):
        with_link(server, lambda link: link.greet(10), protocol="trl")


def test_the_canary_is_compared_with_the_first_servers(server: FakeServer, protocol: str) -> None:
    known = Known()
    with_link(server, lambda link: link.prove(5), known)
    assert len(server.scored()) == len(canary_rows(VOCAB, 256))
    server.logit_VV = FakeTeacher(noise=0.003).logit_VV
    with_link(server, lambda link: link.prove(5), known)
    server.logit_VV = FakeTeacher(noise=0.05).logit_VV
    with pytest.raises(MismatchError, match=rf"^{server.url}: .* of those of {server.url}; got "):
        with_link(server, lambda link: link.prove(5), known)


def test_a_canary_that_is_missed_is_scored_once_more(server: FakeServer) -> None:
    known = Known()
    with_link(server, lambda link: link.prove(5), known)
    right, last = server.logit_VV, canary_rows(VOCAB, 256)[-1].token.tolist()
    server.logit_VV = FakeTeacher(noise=0.05).logit_VV
    server.faults = [Fault(token=last, then=lambda: setattr(server, "logit_VV", right))]
    with_link(server, lambda link: link.prove(5), known)
    assert server.scored().count(last) == 3


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            Fault(
                status=400,
                text='{"error":{"message":"Requested prompt logprobs of 5, which is greater than '
                'max allowed: 3"}}',
            ),
            ConfigError,
            r"a server that gives 5 logprobs; .*--max-logprobs 5 or more\.",
        ),
        (
            Fault(status=400, text="This model's maximum context length is 3 tokens"),
            InputError,
            r"^row 7, http://.*: expected a sequence that the server takes; got status 400: This",
        ),
        (Fault(status=422), InputError, "status 422: no"),
        (Fault(status=401, text="key x"), ConfigError, r"status 401\. .*STILLROOM_API_KEY"),
        (Fault(status=404), ConfigError, "speaks vllm at /v1/completions; got status 404: no"),
        (Fault(status=307), ConfigError, r"teacher\.server\.protocol"),
    ],
    ids=["max_logprobs", "too long", "unprocessable", "key", "no such path", "moved"],
)
def test_a_refusal_says_what_to_do(
    server: FakeServer, fault: Fault, error: type[Exception], message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(error, match=message):
        with_link(server, lambda link: link.score(ROW, SPEC, "row 7"))
    assert len(server.scored()) == 1


def test_the_longest_that_is_asked_for_counts_the_canary() -> None:
    longest = ScoreRow(np.arange(200, dtype=np.uint32), np.array([1]))
    assert longest_asked([], FILES) == 128
    assert longest_asked([ROW, longest], FILES) == 200
