"""A vLLM engine that reads token ids: started with clear errors, given a bounded number of tokens
at a time, and its answers handed on as they finish."""

import time
import weakref
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.cache.errors import ConfigError, InputError, StillroomError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.vllm_config import VllmConfig
from stillroom.cache.vllm_logprobs import TokenLogprobs
from stillroom.cache.vllm_start import cause, device_kind, import_vllm, pooling, start

ARRAYS_IN = "0.32."
"""vLLM versions in which prompt logprobs can be had as arrays; elsewhere they come as lists."""
RESETS, PAUSE_S = 100, 0.05
"""How often an engine is asked to forget its prefixes, and seconds between: steps that were under
way when their requests were dropped hold some of them until they end."""


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """One sequence for the engine."""

    index: int
    """The caller's number of it."""
    token: np.ndarray
    """(n,) ids that it reads."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's `SamplingParams`, or `PoolingParams` in a pooling engine."""

    @property
    def tokens(self) -> int:
        """Tokens that it takes of the engine in the end, at most."""
        return len(self.token) + int(self.params.get("max_tokens", 0))


class VllmEngine:
    """A model that vLLM runs.

    Args:
        files: its inspected folder.
        config: how it runs.
        dtype: compute dtype.
        device: auto, or the kind of device that this vLLM is built for: cpu, cuda, ...
        default: arguments of the engine that the user's settings go before.
        own: arguments of the engine that nobody else sets.
        pools: give hidden states after the last norm in place of tokens.
        as_arrays: take prompt logprobs as arrays where that is known to work; else as vLLM's lists,
            which hold the same and cost much more memory and time.

    Raises:
        MissingError: vLLM is not installed.
        ConfigError: vLLM refuses the model or the settings, or has no room for them.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: VllmConfig,
        *,
        dtype: str,
        device: str = "auto",
        default: Mapping[str, Any] | None = None,
        own: Mapping[str, Any] | None = None,
        pools: bool = False,
        as_arrays: bool = True,
    ) -> None:
        """Start the engine; most of the time that takes is vLLM's."""
        vllm = import_vllm()
        self._window = config.max_tokens_in_flight
        self._as_arrays = as_arrays and vllm.__version__.startswith(ARRAYS_IN)
        self._kept: dict[str, list[Any]] = {}
        self._number = 0
        self._lost: StillroomError | None = None
        self.model_s = 0.0
        """Seconds that the engine worked."""
        self.tokens_in_flight = 0
        """Of the requests that it knows of."""
        kind = device_kind(device)
        hidden = "-hidden" if pools else ""
        self.numeric_class = f"vllm-{vllm.__version__}-{dtype}-{kind}{config.numerics}{hidden}"
        """Engine, version, dtype and device, quantisation if it is set, and what it gives."""
        self._pools = pools
        settings = {**(default or {}), **config.engine_args}
        fixed = {"dtype": dtype, "generation_config": "vllm", **(own or {})}
        self._engine = start(vllm, files, settings, fixed | (pooling() if pools else {}))
        self._is_apart = bool(vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING)
        if self._is_apart:
            weakref.finalize(self, self._engine.engine_core.shutdown)

    @property
    def max_model_len(self) -> int:
        """Longest sequence, in tokens; what is generated counts."""
        return int(self._engine.model_config.max_model_len)

    @property
    def scores_given_ids(self) -> bool:
        """Whether it scores ids that a request names for each token of a prompt."""
        return bool(getattr(self._engine.vllm_config, "use_v2_model_runner", False))

    def run(self, requests: Iterable[VllmRequest]) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, vLLM's output) of each request as it finishes, in any order. Where prompt
        logprobs come as arrays, the output has `TokenLogprobs` in their place.

        Requests are taken while those in the engine are within the tokens of the settings; what is
        in it when the caller stops listening is dropped.

        Raises:
            InputError: vLLM refuses a request; names it.
            ConfigError: the engine failed, names the requests in it; or did so before.
        """
        if self._lost is not None:
            raise self._lost
        waiting, flying = iter(requests), dict[str, VllmRequest]()
        following = next(waiting, None)
        try:
            while following is not None or flying:
                while following and (not flying or self._has_room(following)):
                    flying[self._add(following, flying)] = following
                    following = next(waiting, None)
                for output in self._step(flying):
                    if output.finished:
                        request = flying.pop(output.request_id)
                        self.tokens_in_flight -= request.tokens
                        yield request.index, self._with_arrays(output)
        finally:
            self._drop(flying)

    def load_weights(self, folder: Path) -> None:
        """Go on with the weights of another folder of the same architecture, which is the caller's
        to check.

        Raises:
            InputError: there are requests in it, which it goes on with; or the weights cannot be
                loaded, and the engine is of no use any more.
        """
        if self.tokens_in_flight:
            got, do = f"{self.tokens_in_flight} tokens", "Take or close their answers first."
            raise InputError(str(folder), "an engine without requests", got, do)
        try:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            has_forgotten = self._forget_prefixes()
        except Exception as error:
            do = "Save the model again, and start the engine again."
            self._lost = InputError(str(folder), "weights that vLLM loads", cause(error), do)
            raise self._lost from error
        if not has_forgotten:
            expected, do = "an engine that forgets what old weights made", "Start the engine again."
            self._lost = InputError(str(folder), expected, "one that keeps cached prefixes", do)
            raise self._lost

    def _forget_prefixes(self) -> bool:
        """Whether they are forgotten in the end."""
        for _ in range(RESETS):
            if self._engine.reset_prefix_cache():
                return True
            if self._is_apart:
                time.sleep(PAUSE_S)
            else:
                self._engine.step()
        return False

    def _has_room(self, request: VllmRequest) -> bool:
        return self.tokens_in_flight + request.tokens <= self._window

    def _step(self, flying: Mapping[str, VllmRequest]) -> list[Any]:
        began = time.perf_counter()
        try:
            outputs: list[Any] = self._engine.step()
        except Exception as error:
            raise self._failed(flying.values(), error) from error
        self.model_s += time.perf_counter() - began
        return outputs

    def _failed(self, flying: Iterable[VllmRequest], error: Exception) -> StillroomError:
        """The engine is of no use any more."""
        index = sorted(request.index for request in flying)
        expected = f"answers to {len(index)} requests, {index[0]} to {index[-1]}, "
        expected += f"of {self.tokens_in_flight} tokens"
        do = (
            "vLLM's own lines above say more. If memory ran out, lower max_num_batched_tokens or "
            "gpu_memory_utilization in vllm.engine_args, or vllm.max_tokens_in_flight. Run the "
            "job again."
        )
        got = f"{type(error).__name__}: {cause(error)}"
        self._lost = ConfigError("the vLLM engine", expected, got, do)
        return self._lost

    def _add(self, request: VllmRequest, flying: Mapping[str, VllmRequest]) -> str:
        self._number += 1
        name = f"stillroom-{self._number}"
        prompt = {"type": "token", "prompt_token_ids": request.token.tolist()}
        try:
            params = _params(request.params, pools=self._pools)
            inside = self._engine.add_request(name, prompt, params)
        except ValueError as error:
            expected, do = "a request that vLLM takes", "vLLM's own lines above say more."
            raise InputError(f"request {request.index}", expected, cause(error), do) from error
        except Exception as error:
            raise self._failed([*flying.values(), request], error) from error
        if self._as_arrays and request.params.get("prompt_logprobs") is not None:
            # vLLM would make a Python number of each id, logprob and rank: its own step for that
            # is replaced, in this request only, by one that keeps the tensors as they came.
            state = self._engine.output_processor.request_states[inside]
            tensors = self._kept.setdefault(name, [])
            state.logprobs_processor._update_prompt_logprobs = tensors.append
        self.tokens_in_flight += request.tokens
        return name

    def _with_arrays(self, output: Any) -> Any:
        tensors = self._kept.pop(output.request_id, None)
        if tensors:
            output.prompt_logprobs = TokenLogprobs(
                np.concatenate([t.logprob_token_ids.numpy() for t in tensors]),
                np.concatenate([t.logprobs.numpy() for t in tensors]),
            )
        return output

    def _drop(self, flying: dict[str, VllmRequest]) -> None:
        self.tokens_in_flight -= sum(request.tokens for request in flying.values())
        for name in flying:
            self._kept.pop(name, None)
        if flying and self._lost is None:
            self._engine.abort_request(list(flying))


def _params(given: Mapping[str, Any], *, pools: bool) -> Any:
    """Made anew for each request: vLLM keeps state in them, and derives some of it only here."""
    if pools:
        from vllm import PoolingParams

        return PoolingParams(task="token_embed", use_activation=False, **given)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**given, flat_logprobs=True, detokenize=False, output_kind=kind)
