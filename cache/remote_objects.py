"""Objects of an object store, through obstore: few requests, bounded retries, and settings from
the usual environment variables.

Read from the environment are `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
`AWS_REGION` or `AWS_DEFAULT_REGION` (us-east-1 if neither is set), `AWS_ENDPOINT_URL` or
`AWS_ENDPOINT_URL_S3`, `AWS_VIRTUAL_HOSTED_STYLE_REQUEST` (buckets are part of the path otherwise),
the variables of container and web-identity roles, and those of obstore for other clouds. An
endpoint that begins with http:// is used as it stands. Profiles in `~/.aws` are not read.

A request that fails with a 5xx, a closed connection or, where it is safe, a time limit is tried
again up to `RETRIES` times with exponential back-off, as long as `RETRY_S` have not passed.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.store import ObjectStore

from stillroom.cache.errors import ConfigError
from stillroom.cache.ranges import Span, coalesce, too_large, wrong_size
from stillroom.cache.storage_entry import SAFE_PATH, Entry

if TYPE_CHECKING:
    from obstore import GetResult

THREADS = 32
RETRIES = 10
RETRY_S = 30.0
"""No retry begins later than this after the first request, so that a call waits for at most about
a minute."""
BACKOFF_S = (0.5, 8.0)
"""Shortest and longest wait between two requests."""
CONFLICTS = 5
CONFLICT_S = 0.1
LIST_ATTEMPTS = 5
"""obstore repeats no listing whose answer breaks off in the middle."""
REQUEST_S = 20.0
"""Time limit of one request that moves little."""
GET_BYTES = 8 << 20
"""A whole object that is larger comes in pieces of this size, so that none outlasts its limit..."""
GET_THREADS = 4
"""...of which so many share the line."""
SLOWEST_BYTES_S = 1 << 20
"""A put of many bytes may take as long as it takes at this rate."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
Input = TypeVar("Input")
Output = TypeVar("Output")


class RemoteObjects:
    """Objects below an address.

    Args:
        root: such as `s3://bucket/prefix`.
        options: passed to obstore; they win over our own and over the environment.

    Raises:
        ConfigError: the address or the endpoint holds a password or another secret.
    """

    def __init__(self, root: str, options: dict[str, Any]) -> None:
        """Bind to the address; nothing is read."""
        check_address(root)
        self.root = root
        self._options = options
        self._stores: dict[float, ObjectStore] = {}

    def entry(self, path: str) -> Entry | None:
        """Size and time of an object, or None if it is not there: one request."""
        try:
            found = obstore.head(self._store(), path)
        except FileNotFoundError:
            return None
        return Entry(path, found["size"], found["last_modified"].timestamp())

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """Read a whole object, unless it is larger than that: one request for every `GET_BYTES`,
        and one more for an empty object."""
        answer = self._ask(path, 0, GET_BYTES, None)
        if answer is None:
            return b""
        size = answer.meta["size"]
        if max_bytes is not None and size > max_bytes:
            raise too_large(f"{self.root}/{path}", max_bytes, size)
        first = bytes(answer.bytes())

        def read(start: int) -> memoryview:
            return self._span(path, Span(start, min(start + GET_BYTES, size), []), size)

        rest = self.each(read, range(GET_BYTES, size, GET_BYTES), GET_THREADS)
        return b"".join([first, *rest])

    def get_ranges(
        self, path: str, starts: Sequence[int], lengths: Sequence[int], size: int | None
    ) -> list[bytes]:
        """Read ranges of an object, with the requests that `ranges.coalesce` gives."""
        out = [b""] * len(starts)

        def read(span: Span) -> None:
            data = self._span(path, span, size)
            for member in span.members:
                first = starts[member] - span.start
                out[member] = bytes(data[first : first + lengths[member]])

        self.each(read, coalesce(starts, lengths))
        return out

    def list(self, prefix: str) -> Iterator[Entry]:
        """All objects below a prefix, in any order: one request for every 1,000."""
        return (e for e in self._list(prefix) if SAFE_PATH.fullmatch(e.path))

    def list_all(self) -> Iterator[Entry]:
        """All objects, whatever their names."""
        return self._list(None)

    def _list(self, prefix: str | None) -> Iterator[Entry]:
        for attempt in range(LIST_ATTEMPTS):
            try:
                found = [
                    item for page in obstore.list(self._store(), prefix=prefix) for item in page
                ]
                break
            except GenericError as error:
                if attempt + 1 == LIST_ATTEMPTS or "response body" not in str(error):
                    raise
        for item in found:
            yield Entry(item["path"], item["size"], item["last_modified"].timestamp())

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist: one request, and one more if it is refused. S3
        also refuses (409) where nothing is there but another request is at work; then we look,
        and try again."""
        store = self._store(len(data))
        for attempt in range(CONFLICTS):
            time.sleep(CONFLICT_S * attempt)
            try:
                obstore.put(store, path, data, mode="create")
                return True
            except AlreadyExistsError as error:
                refused = error
            if self.entry(path) is not None:
                return False
        raise refused

    def put(self, path: str, data: bytes) -> None:
        """Write or overwrite an object: one request."""
        obstore.put(self._store(len(data)), path, data, use_multipart=False)

    def delete(self, path: str) -> None:
        """Remove an object if it is there: one request."""
        try:
            obstore.delete(self._store(), path)
        except FileNotFoundError:
            return

    def now(self) -> float:
        """The store's clock, to the second: two requests. The object that they leave is for `gc`:
        whoever asks may lack the right to delete."""
        path = f"probe/{uuid.uuid4().hex}"
        self.put(path, b"now")
        modified: float = obstore.head(self._store(), path)["last_modified"].timestamp()
        return modified

    def each(
        self, function: Callable[[Input], Output], items: Sequence[Input], threads: int = THREADS
    ) -> Sequence[Output]:
        """Call a function on every item, in threads where there are several; order is kept."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(function, items))

    def _span(self, path: str, span: Span, size: int | None) -> memoryview:
        """The bytes of a span that are there."""
        answer = self._ask(path, span.start, span.stop, size)
        return memoryview(b"" if answer is None else answer.bytes())

    def _ask(self, path: str, start: int, stop: int, size: int | None) -> "GetResult | None":
        """The answer to a request for bytes [start, stop), of which no byte is read yet; None if
        the object ends before them. Every answer says how long the whole object is, so an object
        of another size is found without a request."""
        options: Any = {"range": (start, stop)}
        try:
            answer = obstore.get(self._store(), path, options=options)
        except GenericError:
            found = self.entry(path)
            if found is None or found.size_bytes > start:
                raise
            if size is not None:
                raise wrong_size(f"{self.root}/{path}", size, found.size_bytes) from None
            return None
        whole = answer.meta["size"]
        if size is not None and whole != size:
            raise wrong_size(f"{self.root}/{path}", size, whole)
        return answer

    def _store(self, put_bytes: int = 0) -> ObjectStore:
        limit = REQUEST_S
        while limit < put_bytes / SLOWEST_BYTES_S:
            limit *= 2
        if limit not in self._stores:
            self._stores[limit] = self._connect(limit)
        return self._stores[limit]

    def _connect(self, limit_s: float) -> ObjectStore:
        client: dict[str, Any] = {"timeout": timedelta(seconds=limit_s)}
        endpoint = self._endpoint()
        if endpoint is not None and endpoint.startswith("http://"):
            client["allow_http"] = True
        retry: dict[str, Any] = {
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=RETRY_S),
            "backoff": {
                "init_backoff": timedelta(seconds=BACKOFF_S[0]),
                "max_backoff": timedelta(seconds=BACKOFF_S[1]),
                "base": 3,
            },
        }
        options = dict(self._options)
        client |= options.pop("client_options", {})
        retry |= options.pop("retry_config", {})
        connect: Callable[..., ObjectStore] = obstore.store.from_url
        return connect(self.root, client_options=client, retry_config=retry, **options)

    def _endpoint(self) -> str | None:
        names = [os.environ.get(name) for name in ENDPOINTS]
        endpoint = self._options.get("endpoint") or next(filter(None, names), None)
        if endpoint is not None and "@" in urlsplit(endpoint).netloc:
            raise ConfigError(
                "the endpoint of the object store",
                "an address without a user or password",
                "one with them (not shown)",
                "Put credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            )
        return endpoint


def check_address(root: str) -> None:
    """Refuse an address that carries a secret; it is not repeated in the error.

    Raises:
        ConfigError: it has a user, a password, a query or a fragment.
    """
    parts = urlsplit(root)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"a root that begins with {parts.scheme}://",
            "an address with a bucket and a prefix only",
            "one with a user, password, query or fragment (not shown)",
            "Give credentials in environment variables such as AWS_SECRET_ACCESS_KEY.",
        )
