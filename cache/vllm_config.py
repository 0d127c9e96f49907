"""Settings of a vLLM engine, for a teacher or a student. Needs no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stillroom.cache.errors import ConfigError

OURS = (
    "model",
    "tokenizer",
    "revision",
    "trust_remote_code",
    "dtype",
    "runner",
    "convert",
    "pooler_config",
    "generation_config",
    "max_logprobs",
    "logprobs_mode",
    "enable_prefix_caching",
)
"""Arguments of the engine that follow from other settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """How vLLM runs a model."""

    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `vllm.LLM` as it takes them, such as tensor_parallel_size, quantization or
    gpu_memory_utilization; those that other settings decide are refused. A mapping in YAML, a JSON
    object on the command line."""
    max_tokens_in_flight: int = 262_144
    """Tokens of the requests that the engine knows of at once; >= 1. A longer request goes
    alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_tokens_in_flight < 1:
            got = f"{self.max_tokens_in_flight}"
            raise ConfigError("vllm.max_tokens_in_flight", "at least 1", got, "Raise it.")
        for name in OURS:
            if name in self.engine_args:
                do = "Leave it out: it follows from the other settings."
                raise ConfigError("vllm.engine_args", f"no {name}", name, do)
