"""One server of a teacher: who it is, whether it computes what the others do, and its scores of a
row."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from stillroom.cache.canary import (
    SAME_CLASS,
    canary_difference,
    canary_rows,
    canary_scores,
)
from stillroom.cache.errors import ConfigError, InputError, MismatchError, StillroomError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.from_topk import scores_from_topk
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_http import Refused, ask
from stillroom.cache.server_protocol import ServerProtocol, damaged, load_object
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec

GREETING_S = 30.0
GREETING_BYTES = 4 << 20
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")


@dataclass(slots=True)
class Known:
    """What is known of a teacher's servers, which must be alike."""

    version: str | None = None
    """The servers' own, where they tell it."""
    first: str | None = None
    """Address of the one that was met first."""
    longest_row: int | None = None
    """Tokens of the longest row that all of them read, as far as they told it."""
    canary: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """By the number of entries: the address that scored the canary first, and its scores."""


class ServerLink:
    """One server.

    Args:
        url: its base address.
        files: the teacher's.
        config: how servers are asked.
        protocol: how they are spoken to.
        client: sends the requests.
        known: shared by all servers of the teacher.
        parsing: held while an answer is parsed, by one server at a time.
    """

    def __init__(
        self,
        url: str,
        files: ModelFiles,
        config: ServerConfig,
        protocol: ServerProtocol,
        client: httpx2.AsyncClient,
        known: Known,
        parsing: asyncio.Lock,
    ) -> None:
        """Nothing is asked yet."""
        self.url = url
        self._files, self._config, self._protocol = files, config, protocol
        self._client, self._known, self._parsing = client, known, parsing
        self._model: str | None = None

    async def greet(self, longest: int) -> None:
        """Check that the server is up, serves the model, reads long enough sequences, and is of the
        version that the others are.

        Args:
            longest: sequence that it will be asked for, in tokens.

        Raises:
            Trouble: it does not answer.
            ConfigError: it cannot serve this job; says what to change.
            MismatchError: another model or version.
        """
        await self._get(self._protocol.health_path)
        version = None
        if self._protocol.lists_models:
            self._take_model(await self._models(), longest)
            version = await self._version()
        if self._known.first is None:
            self._known.first, self._known.version = self.url, version
        if version != self._known.version:
            expected = f"version {self._known.version}, as {self._known.first} has"
            do = "Run one version on all servers, and start again."
            raise MismatchError(self.url, expected, f"{version}", do)

    async def prove(self, topk: int) -> None:
        """Check that the server scores the canary as the first one did; one that does not scores it
        once more, as what others ask of it at the same time may have moved a score.

        Args:
            topk: entries a position.

        Raises:
            Trouble: it does not answer.
            MismatchError: it computes something else.
            StillroomError: as `score`.
        """
        for _ in range(2):
            scores = await self._score_canary(topk)
            first, expected = self._known.canary.setdefault(topk, (self.url, scores))
            difference = canary_difference(expected, scores)
            if difference.within(SAME_CLASS):
                return
        raise MismatchError(
            self.url,
            f"logprobs within {SAME_CLASS[0]} nats and KL within {SAME_CLASS[1]} of those of"
            f" {first}",
            f"{difference.sampled_nats:.3g} nats and KL {difference.kl_nats:.3g}",
            "One of them does not run the teacher: check their weights and settings.",
        )

    async def _score_canary(self, topk: int) -> dict[str, Any]:
        rows = canary_rows(self._files.vocab_size, self._files.max_length)
        spec = ScoreSpec(topk=topk)
        found = [
            await self.score(row, spec, f"row {i} of the canary") for i, row in enumerate(rows)
        ]
        return canary_scores(found)

    async def score(self, row: ScoreRow, spec: ScoreSpec, where: str) -> RowScores:
        """Scores of a row.

        Args:
            row: what to score.
            spec: what is kept.
            where: the row, for messages.

        Raises:
            Trouble: no answer; safe to ask again.
            CorruptError: the answer is damaged, or about something else.
            NumericsError: NaN, or no distribution.
            ConfigError: the server is not set up for this.
            InputError: the server refuses the row.
        """
        protocol, where = self._protocol, f"{where}, {self.url}"
        try:
            body = await ask(
                self._client,
                self.url + protocol.score_path,
                protocol.request(row, spec.topk, self._model),
                timeout_s=self._config.timeout_s,
                most_bytes=protocol.most_bytes(row, spec.topk),
                where=where,
            )
        except Refused as refused:
            raise self._refused_row(refused, spec.topk, where) from refused
        async with self._parsing:
            return await asyncio.to_thread(self._read, body, row, spec, where)

    def _read(self, body: bytes, row: ScoreRow, spec: ScoreSpec, where: str) -> RowScores:
        found = self._protocol.read(body, row, spec.topk, where)
        sampled_id = row.token[row.targets]
        return scores_from_topk(
            found.topk_id, found.topk_logprob, sampled_id, found.sampled_logprob, spec, where
        )

    def _refused_row(self, refused: Refused, topk: int, where: str) -> StillroomError:
        if "logprobs" in refused.reason and "max allowed" in refused.reason:
            do = f"Start the server with --max-logprobs {topk} or more."
            return ConfigError(self.url, f"a server that gives {topk} logprobs", str(refused), do)
        if refused.status in (400, 413, 422):
            do = "Check the server's limits, or sample shorter completions."
            return InputError(where, "a sequence that the server takes", str(refused), do)
        return self._wrong_server(self._protocol.score_path, refused)

    def _wrong_server(self, path: str, refused: Refused) -> ConfigError:
        if refused.status in (401, 403):
            got, key = f"status {refused.status}", self._config.api_key_env
            do = f"Put the server's key into the environment variable {key}."
            return ConfigError(self.url, "a server that lets us in", got, do)
        do = "Check the address and teacher.server.protocol."
        expected = f"a server that speaks {self._protocol.name} at {path}"
        return ConfigError(self.url, expected, str(refused), do)

    async def _get(self, path: str) -> bytes:
        timeout_s = min(GREETING_S, self._config.timeout_s)
        try:
            return await ask(
                self._client,
                self.url + path,
                None,
                timeout_s=timeout_s,
                most_bytes=GREETING_BYTES,
                where=self.url,
            )
        except Refused as refused:
            raise self._wrong_server(path, refused) from refused

    async def _models(self) -> dict[str, dict[str, Any]]:
        """What the server says of its models, by their names."""
        listed = load_object(await self._get("/v1/models"), self.url).get("data")
        models = listed if isinstance(listed, list) else []
        named = {m["id"]: m for m in models if isinstance(m, dict) and type(m.get("id")) is str}
        if not named or len(named) != len(models):
            raise damaged(f"{self.url}/v1/models", "models by name", json.dumps(listed))
        return named

    def _take_model(self, models: dict[str, dict[str, Any]], longest: int) -> None:
        names, name = ", ".join(models), self._config.model
        if name is None and len(models) > 1:
            do = "Name one with teacher.server.model."
            raise ConfigError(self.url, "one model", f"{names:.200}", do)
        if name is not None and name not in models:
            do = "Check the address and teacher.server.model."
            raise MismatchError(self.url, f"the model {name}", f"{names:.200}", do)
        self._model = next(iter(models)) if name is None else name
        most = models[self._model].get("max_model_len")
        if type(most) is not int:
            return
        self._known.longest_row = min(self._known.longest_row or most, most - 1)
        if most < longest + 1:
            expected = f"a max_model_len of at least {longest + 1}, the longest sequence and one"
            do = f"Start the server with --max-model-len {longest + 1} or more."
            raise ConfigError(self.url, expected, f"{most}", do)

    async def _version(self) -> str | None:
        try:
            body = await self._get("/version")
        except ConfigError:
            return None
        try:
            version = json.loads(body).get("version")
        except (ValueError, AttributeError):
            return None
        return version if isinstance(version, str) and VERSION.fullmatch(version) else None


def longest_asked(rows: Sequence[ScoreRow], files: ModelFiles) -> int:
    """Length of the longest sequence that scoring rows asks a server for, the canary's counted."""
    canary = canary_rows(files.vocab_size, files.max_length)
    return max(len(row.token) for row in (*rows, *canary))
