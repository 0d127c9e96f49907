"""An S3 server on the loopback for tests: moto behind a proxy that can misbehave."""

import http.client
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from tests.cache.faulty_proxy import FaultyProxy

SECRET = "very/secret+key0123456789abcdefghijklmnop"
QUICKLY: dict[str, Any] = {
    "client_options": {"timeout": timedelta(seconds=2)},
    "retry_config": {
        "backoff": {
            "init_backoff": timedelta(milliseconds=2),
            "max_backoff": timedelta(milliseconds=20),
            "base": 2,
        }
    },
}
"""Options of a storage in tests: the same number of retries, but hardly a wait."""
SOON: dict[str, Any] = QUICKLY | {"client_options": {"timeout": timedelta(seconds=0.3)}}
"""The same with a time limit for tests of stalled requests."""


class S3:
    """One bucket of a running server.

    Args:
        port: of moto's server.
    """

    def __init__(self, port: int) -> None:
        """Make the bucket."""
        self.proxy = FaultyProxy(port)
        self.bucket = "bucket"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        credential = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
        connection.request("PUT", f"/{self.bucket}", headers={"Authorization": credential})
        assert connection.getresponse().status == 200
        connection.close()

    def new_root(self) -> str:
        """An address that nothing else uses."""
        return f"s3://{self.bucket}/{uuid.uuid4().hex}/cache"

    def fill(self, root: str, folder: str, count: int) -> None:
        """Put empty objects into a folder of a root without a request."""
        prefix = root.removeprefix(f"s3://{self.bucket}/")
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for number in range(count):
            backend.put_object(self.bucket, f"{prefix}/{folder}/{number:06d}", b"")

    def environment(self) -> dict[str, str]:
        """The environment variables of a job."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.proxy.url,
        }

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set them in this process, and nothing else of AWS."""
        for name in ("SESSION_TOKEN", "REGION", "DEFAULT_REGION", "ENDPOINT_URL_S3", "ALLOW_HTTP"):
            monkeypatch.delenv(f"AWS_{name}", raising=False)
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)


@contextmanager
def serving() -> Iterator[S3]:
    """A server, as long as it is needed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        s3 = S3(server.get_host_and_port()[1])
        yield s3
        s3.proxy.close()
    finally:
        server.stop()
