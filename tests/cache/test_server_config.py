"""Which settings of servers are refused."""

from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.server_config import ServerConfig


def test_addresses_of_both_schemes_are_taken() -> None:
    urls = ("http://a:8000", "https://b.example/teacher/", "http://[::1]:80")
    assert ServerConfig(urls=urls).urls == urls


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "grpc"},
        {"max_tokens_in_flight": 0},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"patience_s": -1},
        {"urls": ("node:8000",)},
        {"urls": ("ftp://node",)},
        {"urls": ("http://",)},
        {"urls": ("http://node:x",)},
        {"urls": ("http://node:99999",)},
        {"urls": ("http://[::1",)},
        {"urls": ("http://node?a=b",)},
        {"urls": ("http://node", "http://node/")},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^server\."):
        ServerConfig(**changes)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"server\.api_key_env") as caught:
        ServerConfig(urls=("http://me:secret@node",))
    assert "secret" not in str(caught.value)
