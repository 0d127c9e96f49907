"""Sampling: the recorded logprobs are those of the distribution that tokens were drawn from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stillroom.cache.errors import NumericsError
from stillroom.cache.fingerprint import inspect_model
from stillroom.replay.sampler import Sampled, SamplerConfig
from stillroom.replay.transformers_sampler import LogprobRecorder, TransformersSampler, stop_ids
from tests.conftest import VOCAB, save_llama

END = VOCAB - 4
STOPS = list(range(40, 60))
PADDING = 16


def make_prompts(lengths: list[int]) -> list[np.ndarray]:
    """Prompts of these lengths, all different."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.uint32) for length in lengths]


PROMPTS = make_prompts([9, 1, 14, 5, 5, 30, 2])


def run(folder: Path, prompts: list[np.ndarray], seed: int = 0, **changes: Any) -> list[Sampled]:
    """Sample once from each prompt, on the CPU; in the prompts' order."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "batch_rows": 3, "device": "cpu"} | changes
    sampler = TransformersSampler(inspect_model(str(folder)), SamplerConfig(**settings))
    pairs = list(sampler.sample(prompts, seed))
    assert sorted(index for index, _ in pairs) == list(range(len(prompts)))
    return [sampled for _, sampled in sorted(pairs, key=lambda pair: pair[0])]


def same(one: list[Sampled], other: list[Sampled]) -> bool:
    """Whether all tokens and logprobs are equal."""
    return all(
        np.array_equal(a.completion, b.completion)
        and np.array_equal(a.behaviour_logprob, b.behaviour_logprob)
        for a, b in zip(one, other, strict=True)
    )


def dense_logprob(
    folder: Path,
    prompt: np.ndarray,
    completion: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """(T, VOCAB): what a completion's tokens were drawn from, by one unpadded forward."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
    with torch.no_grad():
        logit = model(ids[None]).logits[0, len(prompt) - 1 : -1, :VOCAB].double().numpy()
    return np.stack([filtered(row / temperature, top_k, top_p) for row in logit])


def filtered(logit: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Log probabilities after filters, one distribution, in plain NumPy."""
    order = np.argsort(-logit)
    if top_k:
        logit = np.where(logit >= logit[order[top_k - 1]], logit, -np.inf)
    if top_p < 1:
        probability = np.exp(logit[order] - np.logaddexp.reduce(logit))
        likelier = np.concatenate([[0], np.cumsum(probability)[:-1]])
        logit = logit.copy()
        logit[order[likelier >= top_p]] = -np.inf
    return logit - np.float64(np.logaddexp.reduce(logit))


@pytest.fixture(scope="module")
def stopping_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with many stop tokens in its generation config."""
    folder = save_llama(tmp_path_factory.mktemp("models") / "stopping", seed=5)
    set_generation(folder, eos_token_id=STOPS)
    return folder


@pytest.fixture(scope="module")
def padded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose head has rows past the vocabulary, and they are the likeliest."""
    folder = tmp_path_factory.mktemp("models") / "padded"
    save_llama(folder, seed=6, width=VOCAB + PADDING)
    change_weights(folder, "model.embed_tokens.weight", slice(VOCAB, None), 4.0)
    return folder


def set_generation(folder: Path, **values: Any) -> None:
    """Write a checkpoint's own generation settings."""
    (folder / "generation_config.json").write_text(json.dumps(values))


def change_weights(folder: Path, name: str, rows: slice, factor: float) -> None:
    """Multiply some rows of a stored tensor."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][rows] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.6},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()) or "plain",
)
@pytest.mark.parametrize("model", ["student_dir", "padded_dir"])
def test_behaviour_logprobs_equal_a_dense_recomputation(
    settings: dict[str, Any], model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    for prompt, sampled in zip(PROMPTS, run(folder, PROMPTS, **settings), strict=True):
        dense = dense_logprob(folder, prompt, sampled.completion, **settings)
        expected = np.take_along_axis(dense, sampled.completion[:, None].astype(int), 1)[:, 0]
        assert sampled.behaviour_logprob.dtype == np.float32
        assert sampled.completion.dtype == np.uint32
        np.testing.assert_allclose(sampled.behaviour_logprob, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 3}])
def test_the_likeliest_tokens_are_noted_beside_each(
    padded_dir: Path, settings: dict[str, Any]
) -> None:
    for prompt, sampled in zip(PROMPTS, run(padded_dir, PROMPTS, extra=5, **settings), strict=True):
        ids, logprob = sampled.extra_id, sampled.extra_behaviour_logprob
        assert ids is not None
        assert logprob is not None
        assert [str(ids.dtype), str(logprob.dtype)] == ["uint32", "float32"]
        assert ids.shape == logprob.shape == (len(sampled.completion), 5)
        dense = dense_logprob(padded_dir, prompt, sampled.completion, **settings)
        possible = logprob > -np.inf
        assert (possible.sum(1) == settings.get("top_k", 5)).all()
        expected = -np.sort(-dense, axis=1)[:, :5]
        np.testing.assert_allclose(logprob[possible], expected[possible], rtol=0, atol=1e-4)
        own = np.take_along_axis(dense, ids.astype(int).clip(max=VOCAB - 1), 1)
        np.testing.assert_allclose(logprob[possible], own[possible], rtol=0, atol=1e-4)


def test_further_draws_come_as_often_as_their_logprobs_say(student_dir: Path) -> None:
    """With repeats; a filter shuts out what it shuts out of the completion."""
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 6}
    more: dict[str, Any] = {"extra": 4000, "extra_drawn": True, "max_new_tokens": 2}
    (sampled,) = run(student_dir, PROMPTS[:1], **settings, **more)
    ids, logprob = sampled.extra_id, sampled.extra_behaviour_logprob
    assert ids is not None
    assert logprob is not None
    assert ids.shape == logprob.shape == (len(sampled.completion), 4000)
    dense = dense_logprob(student_dir, PROMPTS[0], sampled.completion, **settings)
    own = np.take_along_axis(dense, ids.astype(int), 1)
    np.testing.assert_allclose(logprob, own, rtol=0, atol=1e-4)
    for row, probability in zip(ids, np.exp(dense), strict=True):
        counts = np.bincount(row, minlength=VOCAB)
        deviation = np.sqrt(4000 * probability * (1 - probability))
        assert (np.abs(counts - 4000 * probability) <= 5 * deviation).all()
        assert (counts > 0).sum() == 6


def test_nothing_is_noted_unless_asked_for(student_dir: Path) -> None:
    (sampled,) = run(student_dir, PROMPTS[:1])
    assert sampled.extra_id is None
    assert sampled.extra_behaviour_logprob is None


def test_tokens_are_drawn_as_often_as_their_logprobs_say(student_dir: Path) -> None:
    prompt = PROMPTS[0]
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 6}
    draws = run(student_dir, [prompt] * 4000, max_new_tokens=1, batch_rows=4000, **settings)
    counts = np.bincount([int(s.completion[0]) for s in draws], minlength=VOCAB)
    probability = np.exp(dense_logprob(student_dir, prompt, prompt[:1], **settings)[0])
    deviation = np.sqrt(4000 * probability * (1 - probability))
    assert (np.abs(counts - 4000 * probability) <= 5 * deviation).all()
    assert (counts > 0).sum() == 6


def test_a_stop_token_ends_a_completion_and_belongs_to_it(stopping_dir: Path) -> None:
    stops = {*STOPS, END}
    sampled = run(stopping_dir, PROMPTS * 3, seed=1)
    reasons = {s.finish_reason for s in sampled}
    assert reasons == {"stop", "length"}
    for s in sampled:
        assert len(s.completion) == len(s.behaviour_logprob)
        assert not stops & set(s.completion[:-1].tolist()), "nothing follows a stop token"
        if s.finish_reason == "stop":
            assert int(s.completion[-1]) in stops
        else:
            assert int(s.completion[-1]) not in stops
            assert len(s.completion) == 12


def test_a_stop_token_in_the_prompt_stops_nothing(stopping_dir: Path) -> None:
    prompts = [np.array([STOPS[0], END, 3, END], np.uint32)] * 8
    assert max(len(s.completion) for s in run(stopping_dir, prompts)) > 1


def test_a_batch_that_stops_early_is_whole(stopping_dir: Path) -> None:
    (sampled,) = run(stopping_dir, PROMPTS[:1], seed=3, max_new_tokens=200)
    assert sampled.finish_reason == "stop"
    assert len(sampled.completion) < 200


def test_equal_seeds_give_equal_completions(student_dir: Path) -> None:
    first = run(student_dir, PROMPTS, seed=11)
    assert same(first, run(student_dir, PROMPTS, seed=11))
    other = run(student_dir, PROMPTS, seed=12)
    assert all(
        not np.array_equal(a.completion, b.completion) for a, b in zip(first, other, strict=True)
    )


def test_weights_that_are_taken_over_sample_what_their_model_samples(
    student_dir: Path, teacher_dir: Path
) -> None:
    sampler = TransformersSampler(
        inspect_model(str(student_dir)),
        SamplerConfig(max_new_tokens=12, batch_rows=3, device="cpu"),
    )
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    sampler.take_weights(model.state_dict())
    taken = [sampled for _, sampled in sorted(sampler.sample(PROMPTS, 0), key=lambda pair: pair[0])]
    assert same(taken, run(teacher_dir, PROMPTS))
    assert not same(taken, run(student_dir, PROMPTS))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.equal(sampler.model.model.norm.weight, model.model.norm.weight)


def test_the_global_generator_is_left_alone(student_dir: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(student_dir, PROMPTS[:1], seed=11)
    assert torch.equal(torch.rand(3), expected)


def test_samples_of_one_prompt_differ(student_dir: Path) -> None:
    completions = [tuple(s.completion) for s in run(student_dir, [PROMPTS[0]] * 7)]
    assert len(set(completions)) == 7


@pytest.mark.parametrize("batch_rows", [1, 2, 7, 100])
def test_any_batch_size_covers_every_prompt_once(student_dir: Path, batch_rows: int) -> None:
    sampled = run(student_dir, PROMPTS, batch_rows=batch_rows, max_new_tokens=3)
    for prompt, s in zip(PROMPTS, sampled, strict=True):
        dense = dense_logprob(student_dir, prompt, s.completion)
        expected = [dense[t, token] for t, token in enumerate(s.completion)]
        np.testing.assert_allclose(s.behaviour_logprob, expected, rtol=0, atol=1e-4)


def test_no_prompts_give_no_completions(student_dir: Path) -> None:
    assert run(student_dir, []) == []


def test_a_checkpoints_own_generation_settings_change_nothing(
    student_dir: Path, tmp_path: Path
) -> None:
    plain, biased = (
        Path(shutil.copytree(student_dir, tmp_path / name)) for name in ("plain", "biased")
    )
    set_generation(plain, eos_token_id=END)
    set_generation(
        biased,
        eos_token_id=END,
        do_sample=True,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        top_k=1,
        top_p=0.1,
        min_p=0.5,
        temperature=0.01,
        min_new_tokens=5,
        suppress_tokens=list(range(100)),
    )
    assert same(run(plain, PROMPTS), run(biased, PROMPTS))


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.3}])
def test_the_padding_of_a_head_is_never_sampled(padded_dir: Path, settings: dict[str, Any]) -> None:
    for sampled in run(padded_dir, PROMPTS, **settings):
        assert sampled.completion.max() < VOCAB
        assert np.isfinite(sampled.behaviour_logprob).all()
        assert (sampled.behaviour_logprob <= 0).all()


def test_top_1_is_certain(student_dir: Path) -> None:
    for sampled in run(student_dir, PROMPTS, top_k=1):
        assert (sampled.behaviour_logprob == 0).all()


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_weights_that_are_not_finite_stop_the_sampling(
    student_dir: Path, tmp_path: Path, factor: float
) -> None:
    folder = Path(shutil.copytree(student_dir, tmp_path / "broken"))
    change_weights(folder, "model.norm.weight", slice(0, 3), factor)
    with pytest.raises(NumericsError, match="finite logits"):
        run(folder, PROMPTS)


def test_stop_ids_come_from_the_generation_config_and_the_tokenizer(student_dir: Path) -> None:
    files = inspect_model(str(student_dir))
    assert stop_ids(files, None) == [END]
    assert stop_ids(files, GenerationConfig()) == [END]
    assert stop_ids(files, GenerationConfig(eos_token_id=7)) == [7, END]
    assert stop_ids(files, GenerationConfig(eos_token_id=[9, END, 7])) == [7, 9, END]


def test_without_a_stop_token_every_completion_has_full_length(
    student_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(student_dir, tmp_path / "endless"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    set_generation(folder)
    assert stop_ids(inspect_model(str(folder)), None) == []
    sampled = run(folder, [PROMPTS[1]] * 100, batch_rows=100, max_new_tokens=30)
    assert {(len(s.completion), s.finish_reason) for s in sampled} == {(30, "length")}
    assert any(0 in s.completion for s in sampled), "no token is taken for a stop token"


def test_the_recorder_pairs_each_token_with_the_scores_that_it_was_drawn_from() -> None:
    recorder = LogprobRecorder()
    scores = torch.log(torch.tensor([[[0.5, 0.25, 0.25]], [[0.1, 0.1, 0.8]]]))
    drawn = torch.tensor([[2], [0]])
    recorder(torch.LongTensor([[1]]), torch.FloatTensor(scores[0]))
    recorder(torch.LongTensor([[1, 2]]), torch.FloatTensor(scores[1]))
    (logprob,) = recorder.finish(drawn[1]).tolist()
    assert logprob == pytest.approx(np.log([0.25, 0.1]).tolist())
