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
OTHER_MODEL = (
    "hf_overrides",
    "hf_config_path",
    "config_format",
    "model_class_overrides",
    "model_weights",
    "load_format",
    "model_loader_extra_config",
    "ignore_patterns",
    "code_revision",
    "quantization_config",
    "logits_processors",
    "override_generation_config",
    "watermark_config",
    "diffusion_config",
)
"""Arguments with which an engine runs another model than the folder's, and nobody would know."""
NUMERIC = ("quantization", "kv_cache_dtype", "mamba_cache_dtype", "mamba_ssm_cache_dtype")
"""Arguments that change a model's numbers so much that its numeric class names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmConfig:
    """How vLLM runs a model."""

    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `vllm.LLM` as it takes them, such as tensor_parallel_size, quantization or
    gpu_memory_utilization; those that other settings decide, or that make another model of the
    folder's, are refused. A mapping in YAML, a JSON
    object on the command line."""
    max_tokens_in_flight: int = 262_144
    """Tokens of the requests that the engine knows of at once; >= 1. A longer request goes
    alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_tokens_in_flight < 1:
            got = f"{self.max_tokens_in_flight}"
            raise ConfigError("vllm.max_tokens_in_flight", "at least 1", got, "Raise it.")
        for name in self.engine_args:
            do = "Leave it out: it follows from the other settings."
            if name in OTHER_MODEL:
                do = "Leave it out: it makes another model of the folder's. Change the folder."
            if name in OURS + OTHER_MODEL:
                raise ConfigError("vllm.engine_args", f"no {name}", name, do)

    @property
    def numerics(self) -> str:
        """What a numeric class says of the arguments: empty where none of them is `NUMERIC`."""
        given = {name: self.engine_args.get(name) for name in NUMERIC}
        return "".join(f"-{n}_{v}" for n, v in given.items() if v is not None and v != "auto")
