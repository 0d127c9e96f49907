"""The teacher run by vLLM: log probabilities of the K likeliest tokens as the engine gives them, or
exact scores of any kind from its hidden states.

Shapes: T tokens of a row, P scored positions, H hidden.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig
from stillroom.cache.vllm_engine import VllmEngine, VllmRequest
from stillroom.cache.vllm_logprobs import (
    TokenLogprobs,
    extra_request,
    from_flat,
    score_row,
    with_extra,
)
from stillroom.cache.vllm_start import longest_length

if TYPE_CHECKING:
    from stillroom.cache.vllm_head import OutputHead

DEFAULT = {
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.85,
}
"""Prompt logprobs take a vocabulary of float32 for each token of a step, which vLLM does not count
when it fills the memory."""


class VllmTeacher:
    """A teacher model that vLLM runs.

    Args:
        files: its inspected folder.
        config: how it runs.
        engine: one that runs already, as this teacher would start it; None starts one.

    Raises:
        MissingError: vLLM is not installed.
        ConfigError: vLLM refuses the model or the settings; or what is asked of it needs
            `exact_tail`.
        InputError: with `exact_tail`, the model's head is of another kind.
    """

    def __init__(
        self, files: ModelFiles, config: TeacherConfig, engine: VllmEngine | None = None
    ) -> None:
        """Load the model."""
        self._files, self._config = files, config
        if files.logit_width > files.vocab_size and not config.exact_tail:
            got = f"a head of {files.logit_width} rows for {files.vocab_size} tokens"
            raise _needs_exact("logits of the tokens alone, as vLLM normalises all of them", got)
        self._engine = start_engine(files, config) if engine is None else engine
        self._head = _load_head(files, config) if config.exact_tail else None

    @property
    def numeric_class(self) -> str:
        """Engine, version, dtype and device."""
        return self._engine.numeric_class

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the model and the engine read."""
        spare = 0 if self._head is not None else 1
        return min(self._files.max_length, self._engine.max_model_len - spare)

    def stats(self) -> dict[str, float]:
        """What the engine did so far; see `teacher.stats_of`."""
        in_flight = float(self._engine.tokens_in_flight)
        return {"model_s": self._engine.model_s, "tokens_in_flight": in_flight}

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows, each yielded as it finishes; see `teacher.Teacher`.

        Raises:
            NumericsError: NaN or infinite logits, or an answer for other tokens; names the row.
            InputError: a row is longer than the model or the engine reads.
            ConfigError: the specification needs `exact_tail`.
        """
        if self._head is None:
            self._check_spec(spec)
        self._check_lengths(rows)
        requests = (self._request(index, row, spec) for index, row in enumerate(rows))
        for index, output in self._engine.run(requests):
            yield index, self._scores(index, rows[index], output, spec)

    def _check_spec(self, spec: ScoreSpec) -> None:
        if spec.temperature != 1:
            raise _needs_exact("a temperature of 1", f"{spec.temperature}")
        if spec.extra_kind == "tail":
            raise _needs_exact("no draws from the tail", f"{spec.extra} of them")
        if spec.extra_kind == "student" and not self._engine.scores_given_ids:
            got = f"{spec.extra} of them, and an engine that cannot be asked for single ids"
            raise _needs_exact("no extra ids", got)

    def _check_lengths(self, rows: Sequence[ScoreRow]) -> None:
        longest = self.longest_row
        for index, row in enumerate(rows):
            if len(row.token) > longest:
                expected, got = f"at most {longest} tokens", f"{len(row.token)} tokens"
                do = "Sample shorter completions, or raise max_model_len if it is set."
                raise InputError(f"row {index}", expected, got, do)

    def _request(self, index: int, row: ScoreRow, spec: ScoreSpec) -> VllmRequest:
        params: dict[str, Any] = {}
        if self._head is None:
            params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": spec.topk}
            if spec.extra_kind == "student":
                wanted, start = extra_request(row)
                params |= {"prompt_logprob_token_ids": wanted, "prompt_logprob_start": start}
        return VllmRequest(index, row.token, params)

    def _scores(self, index: int, row: ScoreRow, output: Any, spec: ScoreSpec) -> RowScores:
        where = f"row {index}"
        if self._head is not None:
            return self._exact(index, row, output.outputs.data, spec)
        found = output.prompt_logprobs
        if not isinstance(found, TokenLogprobs):
            found = from_flat(found, len(row.token) - 1, spec.topk, where)
        scores = score_row(found, row, spec, where)
        if spec.extra_kind == "student":
            return with_extra(scores, output.prompt_token_id_logprobs, row, where)
        return scores

    def _exact(self, index: int, row: ScoreRow, hidden_TH: Any, spec: ScoreSpec) -> RowScores:
        import torch

        from stillroom.cache.hidden_scores import score_hidden

        assert self._head is not None
        hidden_PH = hidden_TH[torch.from_numpy(np.asarray(row.targets) - 1)].to(self._head.device)
        rows, head_rows = {index: row}, self._config.head_rows
        return score_hidden(hidden_PH, rows, spec, self._head.logits, head_rows)[0]


def start_engine(files: ModelFiles, config: TeacherConfig, *, as_arrays: bool = True) -> VllmEngine:
    """The engine of a teacher with these settings.

    Args:
        files: its inspected folder.
        config: how it runs.
        as_arrays: as in `VllmEngine`.

    Raises:
        MissingError, ConfigError: as `VllmEngine`.
    """
    own: dict[str, Any] = {"enable_prefix_caching": False}
    if config.exact_tail:
        default = {"gpu_memory_utilization": 0.8, **longest_length(files)}
    else:
        own |= {"max_logprobs": files.logit_width, "logprobs_mode": "raw_logprobs"}
        default = {**DEFAULT, **longest_length(files, extra=1)}
    return VllmEngine(
        files,
        config.vllm,
        dtype=config.dtype,
        device=config.device,
        default=default,
        own=own,
        pools=config.exact_tail,
        as_arrays=as_arrays,
    )


def _load_head(files: ModelFiles, config: TeacherConfig) -> "OutputHead":
    import torch

    from stillroom.cache.causal_lm import pick_device
    from stillroom.cache.vllm_head import OutputHead

    device = config.device  # auto: vLLM's, which is the first GPU that it sees, whatever the rank
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return OutputHead(files, config.dtype, pick_device(device))


def _needs_exact(expected: str, got: str) -> ConfigError:
    do = "Set teacher.exact_tail: true, or take the backend transformers."
    return ConfigError("teacher.backend vllm", expected, got, do)
