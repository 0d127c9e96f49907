"""Completions that vLLM samples: their logprobs are those of the distribution that they were drawn
from, recomputed by transformers, and they follow the weights that were taken last."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.cache.errors import ConfigError, InputError, MismatchError, NumericsError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.vllm_config import VllmConfig
from stillroom.cache.vllm_engine import VllmEngine
from stillroom.replay.sampler import Sampled
from stillroom.replay.vllm_sampler import VllmSampler
from tests.conftest import VOCAB
from tests.vllm.conftest import MAX_LENGTH, PADDING, WINDOW, sampler_config, save_model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
NATS = 5e-4
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).astype(np.uint32) for n in (1, 9, 30, 9, 4, 60, 2, 18, 7, 12)]


def make_sampler(folder: Path, engine: VllmEngine, **settings: Any) -> VllmSampler:
    """A sampler on an engine that runs."""
    config = sampler_config(max_new_tokens=24, **settings)
    return VllmSampler(inspect_model(str(folder)), config, engine)


def in_order(sampler: VllmSampler, seed: int = 0) -> list[Sampled]:
    """Completions in the order of the prompts."""
    found = list(sampler.sample(PROMPTS, seed))
    assert sorted(i for i, _ in found) == list(range(len(PROMPTS)))
    return [dict(found)[i] for i in range(len(PROMPTS))]


def tokens(sampled: list[Sampled]) -> list[list[int]]:
    """Their ids."""
    return [one.completion.tolist() for one in sampled]


def dense(
    model: Any, prompt: np.ndarray, completion: np.ndarray, temperature: float, top_p: float
) -> np.ndarray:
    """(T, VOCAB): log probabilities that a completion's tokens were drawn with."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    with torch.no_grad():
        logit = model(ids[None]).logits[0, len(prompt) - 1 : -1, :VOCAB].double() / temperature
    ordered, order = logit.softmax(-1).sort(-1, descending=True)
    out_of_reach = ordered.cumsum(-1) - ordered >= top_p
    logit = logit.scatter(1, order, logit.gather(1, order).masked_fill(out_of_reach, -torch.inf))
    return np.asarray(logit.log_softmax(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_logprobs_are_of_what_was_drawn_from(
    sampler_engine: VllmEngine, padded_model: Path, temperature: float, top_p: float
) -> None:
    sampler = make_sampler(
        padded_model, sampler_engine, temperature=temperature, top_p=top_p, extra=3
    )
    model = AutoModelForCausalLM.from_pretrained(padded_model)
    for prompt, one in zip(PROMPTS, in_order(sampler), strict=True):
        logprob = dense(model, prompt, one.completion, temperature, top_p)
        at = np.arange(len(one.completion))
        assert one.completion.max() < VOCAB
        assert np.abs(one.behaviour_logprob - logprob[at, one.completion]).max() < NATS
        assert one.extra_id is not None
        assert one.extra_behaviour_logprob is not None
        kept = one.extra_behaviour_logprob > -np.inf
        likeliest = np.sort(logprob, -1)[:, :-4:-1]
        assert np.allclose(one.extra_behaviour_logprob[kept], likeliest[kept], 0, NATS)
        beside = np.take_along_axis(logprob, one.extra_id.astype(int), 1)
        assert np.allclose(beside[kept], likeliest[kept], 0, NATS)
        assert kept.all() or top_p < 1


def test_equal_seeds_give_equal_completions(sampler_engine: VllmEngine, padded_model: Path) -> None:
    """Also of one prompt that is sampled twice, which differ from each other."""
    sampler = make_sampler(padded_model, sampler_engine)
    first = in_order(sampler, seed=3)
    assert tokens(in_order(sampler, seed=3)) == tokens(first)
    assert tokens(in_order(sampler, seed=4)) != tokens(first)
    (_, one), (_, two) = sampler.sample([PROMPTS[1], PROMPTS[1]], 3)
    assert one.completion.tolist() != two.completion.tolist()
    assert first[0].extra_id is None


def test_stop_tokens_and_the_checkpoints_own_settings(
    sampler_engine: VllmEngine, padded_model: Path, tmp_path: Path
) -> None:
    """Its stop tokens end a completion; its temperature and penalties are not followed."""
    own = tmp_path / "own"
    own.mkdir()
    for path in padded_model.iterdir():
        (own / path.name).symlink_to(path)
    (own / "generation_config.json").unlink()
    stops = list(range(0, VOCAB, 5))
    settings = {"eos_token_id": stops, "temperature": 0.01, "repetition_penalty": 3.0}
    (own / "generation_config.json").write_text(json.dumps(settings))
    plain = in_order(make_sampler(padded_model, sampler_engine))
    stopping = in_order(make_sampler(own, sampler_engine))
    for free, one in zip(plain, stopping, strict=True):
        stopped = np.isin(one.completion, [*stops, VOCAB - 4])
        assert not stopped[:-1].any()
        assert one.finish_reason == ("stop" if stopped[-1] else "length")
        assert len(one.completion) == 24 or stopped[-1]
        assert one.completion.tolist() == free.completion.tolist()[: len(one.completion)]
    assert {"stop", "length"} >= {one.finish_reason for one in stopping} >= {"stop"}


def test_weights_are_taken_in_place(
    sampler_engine: VllmEngine, padded_model: Path, tmp_path: Path
) -> None:
    """What is sampled then is what the other checkpoint gives, and the old one's prefixes are
    forgotten."""
    sampler = make_sampler(padded_model, sampler_engine)
    before = in_order(sampler)
    other = save_model(tmp_path / "other", 9, padding=PADDING, tie_word_embeddings=False)
    sampler.take_weights(other)
    try:
        after = in_order(sampler)
        model = AutoModelForCausalLM.from_pretrained(other)
        for prompt, one in zip(PROMPTS, after, strict=True):
            logprob = dense(model, prompt, one.completion, 1.0, 1.0)
            drawn = logprob[np.arange(len(one.completion)), one.completion]
            assert np.abs(one.behaviour_logprob - drawn).max() < NATS
    finally:
        sampler.take_weights(padded_model)
    assert tokens(after) != tokens(before)
    assert tokens(in_order(sampler)) == tokens(before)


def test_weights_of_another_model_are_refused(
    sampler_engine: VllmEngine, padded_model: Path, teacher_model: Path, tmp_path: Path
) -> None:
    sampler = make_sampler(padded_model, sampler_engine)
    before = in_order(sampler)
    with pytest.raises(MismatchError, match="tie_word_embeddings"):
        sampler.take_weights(teacher_model)
    deeper = save_model(tmp_path / "theta", 3, padding=PADDING, tie_word_embeddings=False)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(MismatchError, match="rms_norm_eps"):
        sampler.take_weights(deeper)
    assert tokens(in_order(sampler)) == tokens(before)


def test_prompts_without_room_are_refused(sampler_engine: VllmEngine, padded_model: Path) -> None:
    sampler = make_sampler(padded_model, sampler_engine)
    fits = np.zeros(MAX_LENGTH - 24, np.uint32)
    ((_, one),) = sampler.sample([fits], 0)
    assert 1 <= len(one.completion) <= 24
    with pytest.raises(InputError, match=f"prompt 1: expected at most {MAX_LENGTH - 24} tokens"):
        next(sampler.sample([fits, np.zeros(MAX_LENGTH - 23, np.uint32)], 0))


def test_what_vllm_would_sample_otherwise_is_refused(padded_model: Path) -> None:
    """Before a model is loaded."""
    files = inspect_model(str(padded_model))
    short = VllmConfig(engine_args={"max_model_len": 24})
    cases = [
        (files, sampler_config(extra=2, extra_drawn=True), "extra_drawn"),
        (files, sampler_config(temperature=0.001), "temperature"),
        (replace(files, logit_width=VOCAB + 1025), sampler_config(), "1024 rows"),
        (files, replace(sampler_config(max_new_tokens=24), vllm=short), "max_model_len"),
    ]
    for its, config, named in cases:
        with pytest.raises(ConfigError, match=named):
            VllmSampler(its, config)


def test_requests_are_bounded_and_dropped(sampler_engine: VllmEngine, padded_model: Path) -> None:
    sampler = make_sampler(padded_model, sampler_engine)
    engine = sampler_engine._engine
    found: Any = sampler.sample(PROMPTS, 0)
    next(found)
    states = engine.output_processor.request_states.values()
    assert sum(len(state.prompt_token_ids) + 24 for state in states) <= WINDOW
    found.close()
    assert not engine.has_unfinished_requests()


def test_nan_is_named(sampler_engine: VllmEngine, padded_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "nan", 2, padding=PADDING, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sampler = make_sampler(padded_model, sampler_engine)
    sampler.take_weights(folder)
    try:
        with pytest.raises(NumericsError, match="prompt "):
            in_order(sampler)
    finally:
        sampler.take_weights(padded_model)
