"""What the vLLM sampler refuses before an engine is started, and its seeds."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.vllm_config import VllmConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.replay.vllm_sampler import MAX_PADDING, VllmSampler, seed_of

SHORT = VllmConfig(engine_args={"max_model_len": 256})


@pytest.fixture(scope="module")
def files(student_dir: Path) -> ModelFiles:
    """An inspected student."""
    return inspect_model(str(student_dir))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (SamplerConfig(backend="vllm", extra=2, extra_drawn=True), r"sampler\.extra_drawn"),
        (SamplerConfig(backend="vllm", temperature=0.001), r"temperature: expected at least 0\.01"),
        (SamplerConfig(backend="vllm", vllm=SHORT), r"max_model_len: expected above .* 256"),
    ],
    ids=["drawn", "temperature", "length"],
)
def test_what_vllm_would_sample_otherwise(
    files: ModelFiles, config: SamplerConfig, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        VllmSampler(files, config)


def test_more_padding_than_a_request_can_shut_out(files: ModelFiles) -> None:
    padded = replace(files, logit_width=files.vocab_size + MAX_PADDING + 1)
    with pytest.raises(ConfigError, match="1024 rows"):
        VllmSampler(padded, SamplerConfig(backend="vllm"))


def test_without_vllm_the_message_says_what_to_install(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError, match=r"stillroom\[vllm\]"):
        VllmSampler(files, SamplerConfig(backend="vllm"))


def test_seeds_differ_and_fit_into_63_bits() -> None:
    seeds = [seed_of(seed, index) for seed in (0, 1, 10**15) for index in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    assert seeds == [seed_of(seed, index) for seed in (0, 1, 10**15) for index in range(100)]
