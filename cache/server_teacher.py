"""The teacher behind HTTP servers: rows go out to all of them at once, and every server must have
shown that it computes what the others do.

The servers give the K likeliest tokens of each position and no more, so what needs the full
vocabulary is refused here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.server_http import open_client
from stillroom.cache.server_link import Known, ServerLink, longest_asked
from stillroom.cache.server_protocol import ServerProtocol
from stillroom.cache.server_run import Counts, ServerRun
from stillroom.cache.server_thread import results_of
from stillroom.cache.server_trl import TrlProtocol
from stillroom.cache.server_vllm import VllmProtocol
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig

Deliver = Callable[[tuple[int, RowScores]], None]
WHO_CAN = "The backends transformers, and vllm with exact_tail, can."


class ServerTeacher:
    """A teacher that servers run.

    Args:
        files: its inspected folder, as the servers have it.
        config: which servers, and how they are asked.

    Raises:
        ConfigError: the servers cannot give this teacher's scores.
        MismatchError: they serve another model.
        StorageError: none of them answers.
    """

    def __init__(self, files: ModelFiles, config: TeacherConfig) -> None:
        """Wait until one server answers."""
        if files.logit_width > files.vocab_size:
            got = f"{files.logit_width} rows, of which servers normalise over all"
            raise ConfigError("teacher.backend", f"a head of {files.vocab_size} rows", got, WHO_CAN)
        self._files, self._config = files, config
        self._protocol = _protocol(config.server.protocol, files.vocab_size)
        self._known, self._counts = Known(), Counts()
        list(self._results([], None))

    @property
    def numeric_class(self) -> str:
        """Protocol, the servers' version where they tell it, and dtype."""
        parts = ("server", self._protocol.name, self._known.version, self._config.dtype)
        return "-".join(part for part in parts if part)

    @property
    def longest_row(self) -> int | None:
        """Tokens, prompt and completion, of the longest row that the servers read, as far as they
        told it; None where none did."""
        return self._known.longest_row

    def stats(self) -> dict[str, float]:
        """Requests made again so far; tokens that servers work on, and servers that answer, now."""
        counts = self._counts
        return {
            "retries": counts.retries,
            "tokens_in_flight": counts.tokens_in_flight,
            "servers": counts.servers,
        }

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows on all servers; see `teacher.Teacher`. Each server scores the canary first.

        Raises:
            ConfigError: servers cannot give what the specification asks for.
            InputError: a row is longer than the teacher reads.
            MismatchError: a server computes something else than the others.
            CorruptError: two answers for one row were damaged.
            StorageError: no server answers.
        """
        self._check(spec)
        longest = min(self._files.max_length, self.longest_row or self._files.max_length)
        for i, row in enumerate(rows):
            if len(row.token) > longest:
                expected = f"at most the teacher's {longest} tokens"
                got = f"{len(row.token)} tokens"
                do = "Sample shorter completions, or give the servers a longer --max-model-len."
                raise InputError(f"row {i}", expected, got, do)
        if not rows:
            return iter(())
        return self._results(rows, spec)

    def _check(self, spec: ScoreSpec) -> None:
        if spec.temperature != 1:
            got = f"{spec.temperature}"
            raise ConfigError("temperature", "1 with the backend server", got, WHO_CAN)
        if spec.extra_kind != "none":
            raise ConfigError(
                "extra_kind", "none with the backend server", spec.extra_kind, WHO_CAN
            )
        most = self._protocol.most_topk
        if most is not None and spec.topk > most:
            do = "Make the cache with a smaller --topk, or run a stock vLLM server."
            expected = f"at most {most} with the protocol {self._protocol.name}"
            got = f"{spec.topk}, with what an ensemble or a map of ids asks for beyond K"
            raise ConfigError("topk", expected, got, do)

    def _results(
        self, rows: Sequence[ScoreRow], spec: ScoreSpec | None
    ) -> Iterator[tuple[int, RowScores]]:
        return results_of(lambda deliver: self._run(rows, spec, deliver))

    async def _run(
        self, rows: Sequence[ScoreRow], spec: ScoreSpec | None, deliver: Deliver
    ) -> None:
        """Score rows; with no specification, only greet servers until one answers."""
        longest = longest_asked(rows, self._files)

        async def connect(link: ServerLink) -> None:
            await link.greet(longest)
            if spec is not None:
                await link.prove(spec.topk)

        def score(link: ServerLink, row: ScoreRow, where: str) -> Awaitable[RowScores]:
            assert spec is not None
            return link.score(row, spec, where)

        config, parsing = self._config.server, asyncio.Lock()
        async with open_client(config) as client:
            links = [
                ServerLink(
                    url.rstrip("/"),
                    self._files,
                    config,
                    self._protocol,
                    client,
                    self._known,
                    parsing,
                )
                for url in config.urls
            ]
            run = ServerRun(links, config, connect, score, deliver, self._counts)
            await run.run(rows)


def _protocol(name: str, vocab_size: int) -> ServerProtocol:
    return TrlProtocol(vocab_size) if name == "trl" else VllmProtocol(vocab_size)
