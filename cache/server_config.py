"""Settings of a teacher behind HTTP servers. Needs no HTTP library."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from stillroom.cache.errors import ConfigError

PROTOCOLS = ("vllm", "trl")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Which servers run the teacher, and how they are asked."""

    urls: tuple[str, ...] = ()
    """Base addresses, such as http://node7:8000; all run the same model."""
    protocol: str = "vllm"
    """vllm (a stock server, /v1/completions with prompt_logprobs) or trl (the binary endpoint
    /get_sequence_logprobs/ of TRL 1.1 to 1.10)."""
    model: str | None = None
    """Name under which the servers serve the model; None takes the only one that they have."""
    max_tokens_in_flight: int = 65_536
    """Tokens of the requests that one server works on at once; >= 1. A longer request goes
    alone."""
    timeout_s: float = 600.0
    """Longest wait for one answer, seconds; > 0."""
    patience_s: float = 600.0
    """How long to go on trying while no server answers, seconds; >= 0."""
    api_key_env: str = "STILLROOM_API_KEY"
    """Environment variable with the key that is sent as a bearer token; none is sent if it is not
    set."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.protocol not in PROTOCOLS:
            got, do = repr(self.protocol), "Change the setting."
            raise ConfigError("server.protocol", f"one of {PROTOCOLS}", got, do)
        if self.max_tokens_in_flight < 1 or not self.timeout_s > 0 or not self.patience_s >= 0:
            got = f"{self.max_tokens_in_flight}, {self.timeout_s} and {self.patience_s}"
            names = "server.max_tokens_in_flight, timeout_s, patience_s"
            raise ConfigError(names, "at least 1, above 0, and 0 or more", got, "Change them.")
        for url in self.urls:
            _check_url(url)
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            got, do = ", ".join(self.urls), "Name each server once."
            raise ConfigError("server.urls", "different addresses", got, do)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        do = "Give the whole base address."
        raise ConfigError("server.urls", "http://... or https://...", repr(url), do)
    if "@" in parts.netloc or parts.query or parts.fragment:
        got, do = "one with more", "Put a key into the environment variable of server.api_key_env."
        raise ConfigError("server.urls", "an address of scheme, host, port and path", got, do)
