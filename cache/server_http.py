"""Requests to one server: bounded in bytes and seconds, and every failure sorted into those that
are worth another try and those that are not. The HTTP library is imported here and nowhere else."""

import asyncio
import os
from typing import Any

import httpx2

from stillroom.cache.errors import ConfigError, first_line
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_protocol import damaged

CONNECT_S = 10.0
BUSY = (408, 429, 503)
"""Statuses by which a server says that it cannot take a request now, whatever it holds."""
REASON_BYTES = 16 << 10
SHOWN = 300


class Trouble(Exception):
    """No answer, or not now: asking again is safe, and may help.

    Args:
        reason: for people.
        by_request: whether the request itself may be what the server cannot bear.
    """

    def __init__(self, reason: str, *, by_request: bool) -> None:
        """Keep both."""
        super().__init__(reason)
        self.by_request = by_request


class Refused(Exception):
    """The server says that the request is wrong: it would say so again.

    Args:
        status: of the answer.
        reason: the server's words.
    """

    def __init__(self, status: int, reason: str) -> None:
        """Keep both."""
        super().__init__(f"status {status}: {reason}" if reason else f"status {status}")
        self.status = status
        self.reason = reason


def open_client(config: ServerConfig) -> httpx2.AsyncClient:
    """A client for any number of servers, with the key of the environment in its headers.

    Raises:
        ConfigError: the key cannot be sent in a header.
    """
    headers = {"Accept-Encoding": "identity"}
    if key := os.environ.get(config.api_key_env):
        if not (key.isascii() and key.isprintable()):
            do = "Set it to the key alone, without line breaks."
            raise ConfigError(config.api_key_env, "printable ASCII", "other characters", do)
        headers["Authorization"] = f"Bearer {key}"
    timeout = httpx2.Timeout(None, connect=min(CONNECT_S, config.timeout_s))
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)


async def ask(
    client: httpx2.AsyncClient,
    url: str,
    body: dict[str, Any] | None,
    *,
    timeout_s: float,
    most_bytes: int,
    where: str,
) -> bytes:
    """What a server answers: to a GET without a body, else to a POST of it as JSON.

    Args:
        client: from `open_client`.
        url: whole address.
        body: of the request.
        timeout_s: for the whole answer.
        most_bytes: no answer is longer.
        where: for messages.

    Raises:
        Trouble: it may be asked again.
        Refused: it may not.
        CorruptError: the answer is longer than any can be.
    """
    method = "GET" if body is None else "POST"
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream(method, url, json=body) as response,
        ):
            if response.status_code != 200:
                raise _refusal(response.status_code, await _reason(client, response))
            return await _whole(response, most_bytes, where)
    except TimeoutError as error:
        raise Trouble(f"no answer in {timeout_s:g} s", by_request=True) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise Trouble(_named(error), by_request=False) from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise Trouble(_named(error), by_request=True) from error


def _refusal(status: int, reason: str) -> Trouble | Refused:
    if status in BUSY or status >= 500:
        return Trouble(str(Refused(status, reason)), by_request=status not in BUSY)
    return Refused(status, reason)


async def _whole(response: httpx2.Response, most_bytes: int, where: str) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > most_bytes:
            raise damaged(where, f"at most {most_bytes:,} bytes", "more")
    return bytes(data)


async def _reason(client: httpx2.AsyncClient, response: httpx2.Response) -> str:
    """The server's own words, shortened; it may have repeated the key, which is taken out."""
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > REASON_BYTES:
            break
    text = " ".join(data[:REASON_BYTES].decode("utf-8", "replace").split())
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")
    text = text.replace(key, "***") if key else text
    return "".join(c if c.isprintable() else "?" for c in text)[:SHOWN]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
