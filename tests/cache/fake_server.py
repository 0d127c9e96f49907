"""An HTTP server on the loopback that scores with a table, as a stock vLLM server or as one of TRL,
and misbehaves on demand. Needs only the standard library and numpy.
"""

import base64
import itertools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache.fingerprint import ModelFiles
from tests.cache.fakes import VOCAB, FakeTeacher, log_softmax

FILES = ModelFiles(
    folder=Path("fake"),
    config={},
    fingerprint="f",
    weight_format="F32",
    tokenizer_fingerprint="t",
    vocab_size=VOCAB,
    logit_width=VOCAB,
    max_length=256,
)
WAIT_S = 20.0
"""After which a server that holds answers back gives up, and the test fails."""


def vllm_answer(logit_VV: np.ndarray, token: list[int], topk: int) -> dict[str, Any]:
    """What a vLLM server says of one prompt."""
    logprob_VV = log_softmax(logit_VV).astype(np.float32).astype(float)
    listed: list[Any] = [None]
    for before, token_id in itertools.pairwise(token):
        likeliest = np.argsort(-logprob_VV[before], kind="stable")
        gone = np.isneginf(logprob_VV[before])
        ranks = {int(v): rank + 1 for rank, v in enumerate(likeliest)}
        kept = dict.fromkeys([token_id, *likeliest[:topk].tolist()])
        listed.append(
            {
                str(v): {
                    "logprob": -9999.0 if gone[v] else logprob_VV[before, v],
                    "rank": ranks[v],
                    "decoded_token": f"t{v}",
                }
                for v in kept
            }
        )
    choice = {"index": 0, "text": "x", "prompt_logprobs": listed, "prompt_token_ids": token}
    return {"id": "cmpl-1", "model": "m", "choices": [choice], "usage": {}}


def trl_answer(
    logit_VV: np.ndarray, token: list[int], prompt_length: int, topk: int
) -> dict[str, Any]:
    """What a server of TRL says of one sequence."""
    logprob_TV = log_softmax(logit_VV)[token[prompt_length - 1 : -1]].astype("<f4")
    actual_T1 = np.array(token[prompt_length:], "<i4")[:, None]
    topk_TK = np.argsort(-logprob_TV, axis=1, kind="stable")[:, :topk]
    arrays = {
        "logprobs_b64": np.take_along_axis(logprob_TV, topk_TK, 1),
        "token_ids_b64": topk_TK.astype("<i4"),
        "actual_logprobs_b64": np.take_along_axis(logprob_TV, actual_T1, 1),
        "actual_token_ids_b64": actual_T1,
    }
    encoded = {n: base64.b64encode(a.tobytes()).decode() for n, a in arrays.items()}
    lengths = [len(actual_T1)]
    return {**encoded, "shape": [1, len(actual_T1), topk], "completion_lengths": lengths}


@dataclass(slots=True)
class Fault:
    """What goes wrong with some requests to score."""

    times: int = 1
    token: list[int] | None = None
    """Only of this row, if given."""
    status: int = 200
    text: str = "no"
    """Of an answer with another status than 200."""
    drop: bool = False
    """The connection is closed without an answer."""
    cut: bool = False
    """The answer ends before its announced length."""
    change: Callable[[dict[str, Any]], bytes] | None = None
    """Makes the body from the right answer."""
    then: Callable[[], None] = lambda: None
    """Called before the answer is sent."""


@dataclass(slots=True)
class Request:
    """A request as it came."""

    path: str
    authorization: str | None
    token: list[int] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    """With the usual five, connections that come together are lost."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeServer:
    """A running server.

    Args:
        protocol: vllm or trl.
        logit_VV: logits after each token; None takes those of `FakeTeacher()`.
        port: to listen at; 0 takes a free one.
    """

    def __init__(
        self, protocol: str = "vllm", logit_VV: np.ndarray | None = None, port: int = 0
    ) -> None:
        """Start to listen."""
        self.protocol = protocol
        self.logit_VV = FakeTeacher().logit_VV if logit_VV is None else logit_VV
        self.models: list[dict[str, Any]] = [{"id": "m", "max_model_len": 4096}]
        self.version: str | None = "0.32.0"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.hold_until = 1
        """Rows at work before any of them is answered."""
        self.most_tokens = 0
        """That were at work at once."""
        self._at_work: list[int] = []
        self._lock = threading.Condition()
        self._server = _Server(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def port(self) -> int:
        """That it listens at."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its base address."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop to listen; connections that are open stay so."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def scored(self) -> list[list[int]]:
        """The rows that it was asked for, in order, the canary's among them."""
        with self._lock:
            return [request.token for request in self.requests if request.token]

    def _score(self, body: dict[str, Any]) -> tuple[Fault, dict[str, Any]]:
        """The answer, and what is to go wrong with it."""
        if self.protocol == "vllm":
            [token] = body["prompt"]
            answer = vllm_answer(self.logit_VV, token, body["prompt_logprobs"])
        else:
            [token], [prompt_length] = body["sequences"], body["prompt_lengths"]
            answer = trl_answer(self.logit_VV, token, prompt_length, body["top_logprobs"])
        with self._lock:
            self._at_work.append(len(token))
            self.most_tokens = max(self.most_tokens, sum(self._at_work))
            if len(self._at_work) >= self.hold_until:
                self.hold_until = 1
                self._lock.notify_all()
            assert self._lock.wait_for(lambda: self.hold_until == 1, WAIT_S)
            self._at_work.remove(len(token))
            for fault in self.faults:
                if fault.times and fault.token in (None, token):
                    fault.times -= 1
                    fault.then()
                    return fault, answer
        return Fault(), answer

    def _get(self, path: str) -> tuple[int, bytes]:
        if path == {"vllm": "/health", "trl": "/health/"}[self.protocol]:
            return 200, b""
        if self.protocol == "vllm" and path == "/v1/models":
            return 200, json.dumps({"data": self.models}).encode()
        if self.protocol == "vllm" and path == "/version" and self.version is not None:
            return 200, json.dumps({"version": self.version}).encode()
        return 404, b"nothing here"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                """Health, models, version."""
                fake.requests.append(Request(self.path, self.headers.get("Authorization")))
                self.answer(*fake._get(self.path))

            def do_POST(self) -> None:
                """Scores."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                token = (body.get("prompt") or body.get("sequences"))[0]
                fake.requests.append(Request(self.path, self.headers.get("Authorization"), token))
                fault, answer = fake._score(body)
                if fault.drop:
                    self.close_connection = True
                elif fault.status != 200:
                    self.answer(fault.status, fault.text.encode())
                else:
                    data = json.dumps(answer).encode()
                    self.answer(200, fault.change(answer) if fault.change else data, fault.cut)

            def answer(self, status: int, data: bytes, cut: bool = False) -> None:
                """Send it, or its first half."""
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = self.close_connection or cut

        return Handler
