"""The student run by vLLM, with the logprob of every drawn token after temperature and filters."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stillroom.cache.errors import ConfigError, InputError, NumericsError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.vllm_engine import VllmEngine, VllmRequest
from stillroom.cache.vllm_logprobs import TokenLogprobs, from_flat
from stillroom.cache.vllm_start import longest_length
from stillroom.replay.same_model import check_same_model
from stillroom.replay.sampler import Sampled, SamplerConfig

LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this."""
MAX_PADDING = 1024
"""Ids that one request can shut out."""


class VllmSampler:
    """A student that vLLM runs.

    Args:
        files: its inspected folder.
        config: how it samples.
        engine: one that runs already, as this sampler would start it; None starts one.

    Raises:
        MissingError: vLLM is not installed.
        ConfigError: vLLM refuses the model or the settings, or cannot sample like this.
    """

    def __init__(
        self, files: ModelFiles, config: SamplerConfig, engine: VllmEngine | None = None
    ) -> None:
        """Load the model."""
        _check(files, config)
        self._files, self._config = files, config
        self._stop = _stop_ids(files)
        self._num_noted = min(config.extra, files.vocab_size)
        padding = range(files.vocab_size, files.logit_width)
        self._shut_out = dict.fromkeys(padding, -np.inf) or None
        self._engine = start_engine(files, config) if engine is None else engine
        if config.max_new_tokens >= self._engine.max_model_len:
            expected = f"below {self._engine.max_model_len}, the longest sequence of the engine"
            got, do = f"{config.max_new_tokens}", "Lower it, or raise max_model_len if it is set."
            raise ConfigError("sampler.max_new_tokens", expected, got, do)

    def take_weights(self, folder: str | Path) -> None:
        """Sample with the weights of another folder from now on; the engine goes on running.

        Args:
            folder: a whole model of the same architecture and vocabulary, such as a published
                student.

        Raises:
            MismatchError: it is another model; the engine has its old weights.
            InputError, MissingError: its files cannot be read. If vLLM was reading them, the
                engine is of no use any more.
        """
        files = inspect_model(str(folder))
        check_same_model(self._files, files)
        self._engine.load_weights(files.folder)

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """Sample a completion of each prompt; see `sampler.StudentSampler`.

        Raises:
            NumericsError: NaN or infinite logits; names the prompt.
            InputError: a prompt leaves no room for a completion.
        """
        room = self._engine.max_model_len - self._config.max_new_tokens
        for index, prompt in enumerate(prompts):
            if len(prompt) > room:
                expected, got = f"at most {room} tokens, to leave room", f"{len(prompt)}"
                do = "Lower sampler.max_new_tokens, or raise max_model_len if it is set."
                raise InputError(f"prompt {index}", expected, got, do)
        requests = (
            VllmRequest(index, prompt, self._params(seed_of(seed, index)))
            for index, prompt in enumerate(prompts)
        )
        for index, output in self._engine.run(requests):
            yield index, self._sampled(output.outputs[0], f"prompt {index}")

    def _params(self, seed: int) -> dict[str, Any]:
        return {
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "top_k": self._config.top_k,
            "max_tokens": self._config.max_new_tokens,
            "seed": seed,
            "logprobs": self._num_noted,
            "stop_token_ids": self._stop,
            "ignore_eos": True,
            "logit_bias": self._shut_out,
        }

    def _sampled(self, output: Any, where: str) -> Sampled:
        drawn = np.array(output.token_ids, np.int64)
        found = from_flat(output.logprobs, len(drawn), self._num_noted, where)
        _check_drawn(drawn, found, self._files.vocab_size, where)
        stopped = bool(np.isin(drawn[-1:], self._stop).any())
        if not stopped and len(drawn) != self._config.max_new_tokens:
            expected = f"a stop token or {self._config.max_new_tokens} tokens"
            got = f"{len(drawn)} tokens and the end {output.finish_reason!r}"
            raise InputError(where, expected, got, "Sample it again, or look at vLLM's own lines.")
        logprob = np.minimum(found.logprob, 0)
        return Sampled(
            drawn.astype(np.uint32),
            logprob[:, 0],
            "stop" if stopped else "length",
            found.token_id[:, 1:].astype(np.uint32) if self._config.extra else None,
            logprob[:, 1:] if self._config.extra else None,
        )


def start_engine(files: ModelFiles, config: SamplerConfig) -> VllmEngine:
    """The engine of a sampler with these settings.

    Raises:
        MissingError, ConfigError: as `VllmEngine`.
    """
    return VllmEngine(
        files,
        config.vllm,
        dtype=config.dtype,
        device=config.device,
        default=longest_length(files),
        own={
            "enable_prefix_caching": True,
            "max_logprobs": max(1, config.extra),
            "logprobs_mode": "processed_logprobs",
        },
    )


def seed_of(seed: int, index: int) -> int:
    """Seed of one of several completions, 0 to 2^63 - 1."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{index}".encode()) >> 1


def _check_drawn(drawn: np.ndarray, found: TokenLogprobs, vocab_size: int, where: str) -> None:
    logprob = found.logprob[:, 0]
    if not np.isfinite(logprob).all() or np.isnan(found.logprob).any():
        do = "Sample in float32 or bfloat16, or check the student's weights."
        raise NumericsError(where, "finite logits", "NaN or infinite ones", do)
    if not len(drawn) or (drawn >= vocab_size).any() or (found.token_id[:, 0] != drawn).any():
        expected = f"tokens below {vocab_size}, each with its own logprob"
        do = "Report this engine and its version."
        raise NumericsError(where, expected, f"{drawn.tolist()!r:.80}", do)


def _check(files: ModelFiles, config: SamplerConfig) -> None:
    """Refuse what would sample something else than is asked for, before the model is loaded."""
    if config.extra_drawn:
        expected, do = "false: vLLM tells no further draws", "Note the likeliest, or use another."
        raise ConfigError("sampler.extra_drawn", expected, "true", do)
    if config.temperature < LEAST_TEMPERATURE:
        expected, got = f"at least {LEAST_TEMPERATURE} with vLLM", f"{config.temperature}"
        raise ConfigError("sampler.temperature", expected, got, "Raise it.")
    padding = files.logit_width - files.vocab_size
    if padding > MAX_PADDING:
        expected = f"at most {MAX_PADDING} rows of the head that are no token, with vLLM"
        do = "Take the backend transformers."
        raise ConfigError(str(files.folder), expected, f"{padding}", do)
    length = config.vllm.engine_args.get("max_model_len")
    if isinstance(length, int) and 0 < length <= config.max_new_tokens:
        expected = f"above sampler.max_new_tokens, {config.max_new_tokens}"
        raise ConfigError("vllm.engine_args, max_model_len", expected, f"{length}", "Raise it.")


def _stop_ids(files: ModelFiles) -> list[int]:
    from transformers import AutoConfig, GenerationConfig

    from stillroom.replay.transformers_sampler import stop_ids

    try:
        settings = GenerationConfig.from_pretrained(files.folder)
    except OSError:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(files.folder))
    return stop_ids(files, settings)
