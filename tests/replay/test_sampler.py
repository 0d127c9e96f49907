"""Sampler settings: their ranges, and what of them is stored with every part."""

import math
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError
from stillroom.replay.sampler import SamplerConfig, notes_likeliest


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples_per_prompt": 0},
        {"max_new_tokens": 0},
        {"batch_rows": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"extra": -1},
        {"extra_drawn": True},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**wrong)
    assert name in caught.value.where


def test_recorded_is_all_that_decides_the_distribution() -> None:
    config = SamplerConfig(temperature=0.7, top_k=20, top_p=0.9, samples_per_prompt=4)
    assert config.recorded() == {
        "samples_per_prompt": 4,
        "max_new_tokens": 256,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "dtype": "float32",
        "behaviour_logprob": "after temperature and filters",
    }
    assert jsonfile.load(jsonfile.dump(config.recorded()), "recorded") == config.recorded()


def test_extra_ids_are_recorded_where_there_are_any() -> None:
    assert SamplerConfig(extra=4).recorded() == SamplerConfig().recorded() | {"extra": 4}
    drawn = SamplerConfig(extra=4, extra_drawn=True).recorded()
    assert drawn == SamplerConfig(extra=4).recorded() | {"extra_drawn": True}


def test_extra_ids_are_likeliest_tokens_unless_a_record_says_otherwise() -> None:
    assert notes_likeliest(SamplerConfig(extra=4).recorded())
    assert not notes_likeliest(SamplerConfig(extra=4, extra_drawn=True).recorded())
    assert not notes_likeliest(SamplerConfig().recorded())
    assert not notes_likeliest({"temperature": None}), "an import brings what it brings"


def test_where_and_in_what_batches_it_runs_is_not_recorded() -> None:
    one = SamplerConfig(batch_rows=1, device="cpu")
    assert one.recorded() == SamplerConfig(batch_rows=64, device="cuda:1").recorded()
