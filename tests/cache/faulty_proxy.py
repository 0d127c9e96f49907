"""An HTTP proxy on the loopback that counts requests and, on demand, misbehaves.

It passes requests to a server one put at a time, so that the server's test of a put's condition and
its write are one step. Needs only the standard library.
"""

import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal["refuse", "deny", "drop", "stall", "fail", "lose", "truncate"]
"""What becomes of a request. Before it takes effect: "refuse" answers with an error, "deny" with
S3's AccessDenied, "drop" closes the connection, "stall" says nothing. After it took effect: "fail"
answers with an error, "lose" closes the connection, "truncate" closes it in the middle of the body.
"""
BEFORE = ("refuse", "deny", "drop", "stall")
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>AccessDenied</Code><Message>Not you</Message></Error>"
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """Names in lower case."""


@dataclass(slots=True)
class Fault:
    """What goes wrong, and for which requests."""

    kind: Kind
    method: str
    part: str
    """What the path must contain."""
    times: int
    status: int


@dataclass(slots=True)
class Answer:
    """What the server said."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class FaultyProxy:
    """A running proxy.

    Args:
        port: of the server, on the loopback.
    """

    def __init__(self, port: int) -> None:
        """Start to listen."""
        self.requests: list[Request] = []
        self.ignores_conditions = False
        """Whether If-None-Match is kept from the server."""
        self._port = port
        self._faults: list[Fault] = []
        self._lock, self._put_lock = threading.Lock(), threading.Lock()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the proxy."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def misbehave(
        self, kind: Kind, method: str = "", part: str = "", *, times: int = 1, status: int = 500
    ) -> None:
        """Do so with the next requests of a method whose path contains a string."""
        with self._lock:
            self._faults.append(Fault(kind, method, part, times, status))

    def behave(self) -> None:
        """Forget all faults and all requests, and let go of what is stalled."""
        with self._lock:
            self._faults, self.ignores_conditions = [], False
            self.requests.clear()
            self._released.set()
            self._released = threading.Event()

    def count(self, method: str = "", part: str = "") -> int:
        """Requests that came since the last `behave`."""
        with self._lock:
            return sum(method in r.method and part in r.path for r in self.requests)

    def close(self) -> None:
        """Stop."""
        self.behave()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: Request, body: bytes) -> tuple[Answer | None, bool]:
        """The answer to a request, if any, and whether it ends in the middle."""
        with self._lock:
            self.requests.append(request)
            fault, released = self._fault_of(request), self._released
        if fault is not None and fault.kind == "stall":
            released.wait()
        if fault is not None and fault.kind == "deny":
            return Answer(403, body=DENIED), False
        if fault is not None and fault.kind in BEFORE:
            return (Answer(fault.status) if fault.kind == "refuse" else None), False
        answer = self._forward(request, body)
        if fault is None:
            return answer, False
        if fault.kind == "truncate":
            return answer, True
        return (Answer(fault.status) if fault.kind == "fail" else None), False

    def _fault_of(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if fault.times and fault.method in request.method and fault.part in request.path:
                fault.times -= 1
                return fault
        return None

    def _forward(self, request: Request, body: bytes) -> Answer:
        headers = dict(request.headers)
        if self.ignores_conditions:
            headers.pop("if-none-match", None)
        if request.method != "PUT":
            return self._ask(request, headers, body)
        with self._put_lock:
            return self._ask(request, headers, body)

    def _ask(self, request: Request, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(request.method, request.path, body, headers)
            reply = connection.getresponse()
            return Answer(reply.status, reply.getheaders(), reply.read())
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                request = Request(self.command, self.path, headers)
                answer, cut = proxy.answer(request, body)
                self.close_connection = answer is None or cut
                if answer is not None:
                    self.wfile.write(_encoded(self.command, answer, cut))

        return Handler


def _encoded(method: str, answer: Answer, cut: bool) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, 'Odd')}"]
    kept = [(n, v) for n, v in answer.headers if n.lower() not in ("connection", "date")]
    if "content-length" not in [name.lower() for name, _ in kept]:
        kept.append(("Content-Length", str(len(answer.body))))
    lines += [f"{name}: {value}" for name, value in kept]
    body = answer.body[: len(answer.body) // 2] if cut else answer.body
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body)
