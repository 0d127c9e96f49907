"""An S3 server on the loopback, in a process of its own, with a copy of a cache: moto's, which
keeps objects in memory and counts requests."""

import http.client
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from stillroom.cache.errors import ConfigError
from stillroom.cache.storage import Storage

BUCKET = "bench"
ROOT = f"s3://{BUCKET}/cache"
START_S = 60


@dataclass(frozen=True, slots=True)
class S3:
    """A running server."""

    environment: dict[str, str]
    """Variables with which `ROOT` opens."""
    _count: Any

    @property
    def requests(self) -> int:
        """Requests so far."""
        return int(self._count.value)


@contextmanager
def serving() -> Iterator[S3]:
    """A server with an empty bucket.

    Raises:
        ConfigError: moto is not installed.
    """
    if importlib.util.find_spec("moto") is None:
        raise ConfigError("s3", "moto's server", "none", "pip install 'moto[s3,server]'")
    context = get_context("spawn")
    count = context.Value("q", 0)
    ours, theirs = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(theirs, count), daemon=True)
    server.start()
    theirs.close()
    try:
        port = ours.recv() if ours.poll(START_S) else None
        if port is None:
            do = "Leave s3 out."
            raise ConfigError("s3", f"a server within {START_S} s", "none", do)
        _make_bucket(port)
        environment = {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }
        yield S3(environment, count)
    finally:
        server.terminate()
        server.join()


def upload(root: str, environment: dict[str, str]) -> None:
    """Copy a local cache to `ROOT`."""
    os.environ.update(environment)
    source, target = Storage(root), Storage(ROOT)
    for entry in source.list_all():
        target.put(entry.path, source.get(entry.path))


def _serve(port: Any, count: Any) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)

    def counted(environment: Any, start: Any) -> Any:
        with count.get_lock():
            count.value += 1
        return application(environment, start)

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    port.send(server.server_address[1])
    server.serve_forever()


def _make_bucket(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    credential = "AWS4-HMAC-SHA256 Credential=bench/20260101/us-east-1/s3/aws4_request"
    connection.request("PUT", f"/{BUCKET}", headers={"Authorization": credential})
    connection.getresponse().read()
    connection.close()
