"""How an engine is started and fed, with a package in vLLM's place that answers at once: what it is
given and when, what is dropped, and what its refusals become."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.vllm_config import VllmConfig
from stillroom.cache.vllm_engine import VllmEngine, VllmRequest

FILES = ModelFiles(
    folder=Path("model"),
    config={},
    fingerprint="f",
    weight_format="F32",
    tokenizer_fingerprint="t",
    vocab_size=40,
    logit_width=40,
    max_length=64,
)
WINDOW = 30


class Inside:
    """In place of vLLM's engine: each step finishes the request that it has known longest."""

    def __init__(self, **arguments: Any) -> None:
        if "refused" in arguments:
            raise ValueError(f"1 validation error\n  refused: {arguments['refused']}")
        self.arguments = arguments
        self.environment = dict(os.environ)
        self.known: dict[str, tuple[list[int], Any]] = {}
        self.most = 0
        self.dropped: list[str] = []
        self.loaded: list[str] = []
        self.resets = [True]
        self.failure: Exception | None = None
        self.model_config = SimpleNamespace(max_model_len=arguments.get("max_model_len", 8))
        self.vllm_config = SimpleNamespace(use_v2_model_runner=True)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, name: str, prompt: Any, params: Any) -> str:
        """Know of a request."""
        if len(prompt["prompt_token_ids"]) > 60:
            raise ValueError("too long")
        self.known[name] = (prompt["prompt_token_ids"], params)
        self.most = max(self.most, sum(len(ids) for ids, _ in self.known.values()))
        return name

    def step(self) -> list[Any]:
        """Finish one; the one after it is under way."""
        if self.failure is not None:
            raise self.failure
        name, *others = self.known
        outputs = [SimpleNamespace(request_id=other, finished=False) for other in others[:1]]
        ids, params = self.known.pop(name)
        return [*outputs, SimpleNamespace(request_id=name, finished=True, ids=ids, params=params)]

    def abort_request(self, names: list[str]) -> None:
        """Forget requests."""
        assert self.failure is None, "a dead engine is asked for nothing"
        self.dropped += names
        for name in names:
            del self.known[name]

    def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        """Load weights, except broken ones."""
        assert method == "reload_weights"
        if "broken" in kwargs["weights_path"]:
            raise RuntimeError("no such tensor")
        self.loaded.append(kwargs["weights_path"])

    def reset_prefix_cache(self) -> bool:
        """Forget prefixes, or not yet."""
        done = self.resets.pop(0) if len(self.resets) > 1 else self.resets[0]
        self.loaded.append("prefixes forgotten" if done else "prefixes kept")
        return done


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name for one test."""
    names = ("vllm", "vllm.platforms", "vllm.sampling_params", "vllm.config")
    vllm, platforms, params, settings = map(ModuleType, names)
    made: dict[str, Any] = {
        "__version__": "0.99.0",
        "envs": SimpleNamespace(VLLM_ENABLE_V1_MULTIPROCESSING=True),
        "LLM": lambda model, **a: SimpleNamespace(llm_engine=Inside(model=model, **a)),
        "SamplingParams": lambda **given: given,
        "platforms": platforms,
    }
    vllm.__dict__.update(made)
    platforms.__dict__["current_platform"] = SimpleNamespace(device_type="table")
    params.__dict__["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY="final")
    settings.__dict__["PoolerConfig"] = dict
    monkeypatch.setattr("stillroom.cache.vllm_engine.PAUSE_S", 0.0)
    for module in (vllm, platforms, params, settings):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def start(**settings: Any) -> VllmEngine:
    """An engine with a small window."""
    given = {"default": {"max_model_len": 65, "seed": 1}, "own": {"max_logprobs": 5}, **settings}
    arguments = given.pop("engine_args", {})
    config = VllmConfig(engine_args=arguments, max_tokens_in_flight=WINDOW)
    return VllmEngine(FILES, config, dtype="float32", **given)


def inside(engine: VllmEngine) -> Inside:
    """What stands in vLLM's place."""
    found: Inside = engine._engine
    return found


def requests(*lengths: int, **params: Any) -> list[VllmRequest]:
    """Requests of so many tokens each."""
    return [VllmRequest(i, np.full(n, i, np.uint32), params) for i, n in enumerate(lengths)]


def test_arguments_of_all_kinds_reach_the_engine() -> None:
    engine = start(engine_args={"seed": 7, "tensor_parallel_size": 2})
    assert inside(engine).arguments == {
        "model": "model",
        "max_model_len": 65,
        "seed": 7,
        "tensor_parallel_size": 2,
        "dtype": "float32",
        "generation_config": "vllm",
        "max_logprobs": 5,
    }
    assert engine.numeric_class == "vllm-0.99.0-float32-table"
    assert engine.max_model_len == 65
    assert engine.scores_given_ids


def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are spawned unless the user says otherwise."""
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    monkeypatch.delenv(name, raising=False)
    assert inside(start()).environment[name] == "spawn"
    assert name not in os.environ
    monkeypatch.setenv(name, "fork")
    assert inside(start()).environment[name] == "fork"
    assert os.environ[name] == "fork"


def test_requests_are_fed_within_the_window() -> None:
    engine = start()
    lengths = (10, 10, 10, 10, 50, 5, 5)
    found = list(engine.run(requests(*lengths)))
    assert sorted(index for index, _ in found) == list(range(len(lengths)))
    assert all(output.ids == [index] * lengths[index] for index, output in found)
    assert inside(engine).most == 50
    assert engine.tokens_in_flight == 0
    engine = start()
    list(engine.run(requests(*[7] * 20)))
    assert inside(engine).most == WINDOW // 7 * 7


def test_tokens_to_come_count_too() -> None:
    engine = start()
    list(engine.run(requests(*[5] * 12, max_tokens=5)))
    assert inside(engine).most == WINDOW // 10 * 5


def test_each_request_has_parameters_of_its_own() -> None:
    shared = {"logprobs": 2}
    found = list(start().run([VllmRequest(i, np.ones(3, np.uint32), shared) for i in range(2)]))
    first, second = (output.params for _, output in found)
    assert first == {**shared, "flat_logprobs": True, "detokenize": False, "output_kind": "final"}
    assert first is not second


def test_what_is_under_way_is_dropped_with_its_caller() -> None:
    engine = start()
    running = engine.run(requests(10, 10, 10, 10))
    assert next(running)[0] == 0
    assert engine.tokens_in_flight == 20
    running.close()
    assert len(inside(engine).dropped) == 2
    assert engine.tokens_in_flight == 0
    assert [index for index, _ in engine.run(requests(4, 4))] == [0, 1]


def test_refusals_say_what_was_asked() -> None:
    with pytest.raises(ConfigError, match=r"'refused': 3.*1 validation error refused: 3.*above"):
        start(engine_args={"refused": 3})
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        start(engine_args={"refused": "max_num"})
    with pytest.raises(ConfigError, match=r"auto or table, .*got 'cuda:1'"):
        start(device="cuda:1")
    assert start(device="table").numeric_class.endswith("-table")


def test_the_numeric_class_tells_quantisation_and_hidden_states() -> None:
    engine = start(engine_args={"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"})
    named = "vllm-0.99.0-float32-table-quantization_fp8-kv_cache_dtype_fp8_e4m3"
    assert engine.numeric_class == named
    assert start(pools=True).numeric_class == "vllm-0.99.0-float32-table-hidden"


def test_an_engine_that_fails_says_what_was_in_it() -> None:
    """Of what use it is then is not asked again."""
    engine = start()
    running = engine.run(requests(10, 10, 10, 10))
    next(running)
    inside(engine).failure = RuntimeError("CUDA out of memory")
    expected = "3 requests, 1 to 3, of 30 tokens; got RuntimeError: CUDA out of memory"
    with pytest.raises(ConfigError, match=f"{expected}.*max_num_batched_tokens or gpu_memory_util"):
        next(running)
    assert inside(engine).dropped == []
    with pytest.raises(ConfigError, match="CUDA out of memory"):
        list(engine.run(requests(3)))


def test_a_request_that_vllm_refuses_is_named() -> None:
    engine = start()
    with pytest.raises(InputError, match=r"request 1: .*too long"):
        list(engine.run(requests(3, 61)))
    assert engine.tokens_in_flight == 0
    assert [index for index, _ in engine.run(requests(4))] == [0]


def test_weights_are_loaded_whole_or_the_engine_is_given_up() -> None:
    engine = start()
    engine.load_weights(Path("next"))
    assert inside(engine).loaded == ["next", "prefixes forgotten"]
    list(engine.run(requests(3)))
    with pytest.raises(InputError, match="broken: expected weights that vLLM loads; got no such"):
        engine.load_weights(Path("broken"))
    with pytest.raises(InputError, match="start the engine again"):
        list(engine.run(requests(3)))


def test_weights_do_not_change_under_a_request() -> None:
    engine = start()
    running = engine.run(requests(10, 10, 10))
    next(running)
    with pytest.raises(InputError, match="without requests; got 20 tokens"):
        engine.load_weights(Path("next"))
    assert inside(engine).loaded == []
    assert len(list(running)) == 2
    engine.load_weights(Path("next"))


def test_prefixes_of_old_weights_are_forgotten_before_anything_else() -> None:
    engine = start()
    inside(engine).resets = [False, False, True]
    engine.load_weights(Path("next"))
    assert inside(engine).loaded == ["next", *["prefixes kept"] * 2, "prefixes forgotten"]
    list(engine.run(requests(3)))
    inside(engine).resets = [False]
    with pytest.raises(InputError, match="keeps cached prefixes"):
        engine.load_weights(Path("later"))
    with pytest.raises(InputError, match="keeps cached prefixes"):
        list(engine.run(requests(3)))
