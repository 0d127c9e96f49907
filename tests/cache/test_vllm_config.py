"""Settings of a vLLM engine: what other settings decide cannot be set here too."""

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.vllm_config import OTHER_MODEL, OURS, VllmConfig


def test_engine_arguments_are_taken_as_they_are() -> None:
    arguments = {"tensor_parallel_size": 2, "compilation_config": {"mode": 3}}
    assert VllmConfig(engine_args=arguments).engine_args == arguments


@pytest.mark.parametrize("name", OURS)
def test_what_follows_from_other_settings_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no {name}; got {name}"):
        VllmConfig(engine_args={name: 1})


@pytest.mark.parametrize("name", OTHER_MODEL)
def test_what_makes_another_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no {name}; got {name}.*Change the folder"):
        VllmConfig(engine_args={"tensor_parallel_size": 2, name: {}})


def test_what_changes_numbers_is_told() -> None:
    told = VllmConfig(engine_args={"kv_cache_dtype": "fp8", "quantization": "fp8_per_tensor"})
    assert told.numerics == "-quantization_fp8_per_tensor-kv_cache_dtype_fp8"
    assert VllmConfig(engine_args={"kv_cache_dtype": "auto", "quantization": None}).numerics == ""


def test_a_window_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens_in_flight"):
        VllmConfig(max_tokens_in_flight=0)
