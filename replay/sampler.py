"""What a student sampler is to the rollout job, whichever engine runs it. Needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from stillroom.cache.errors import ConfigError
from stillroom.cache.teacher import DTYPES
from stillroom.cache.vllm_config import VllmConfig

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How completions are sampled."""

    samples_per_prompt: int = 1
    """Completions of each prompt; >= 1."""
    max_new_tokens: int = 256
    """Longest completion, in tokens; >= 1."""
    temperature: float = 1.0
    """Divides the logits before the softmax; > 0."""
    top_p: float = 1.0
    """Keep the likeliest tokens that cover this probability; 0 < top_p <= 1, 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    extra: int = 0
    """Tokens to note beside each one that is drawn, for a cache that scores M ids of the student;
    >= 0 and at most M. Those that a filter shut out are not noted."""
    extra_drawn: bool = False
    """Whether those are further draws, with repeats, for objectives that are made of draws; else
    they are the likeliest tokens."""
    batch_rows: int = 32
    """Sequences that are generated together; >= 1."""
    dtype: str = "float32"
    """Compute dtype: float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N."""
    backend: str = "transformers"
    """What runs the model: transformers or vllm."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Of the backend vllm."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.samples_per_prompt, self.max_new_tokens, self.batch_rows) < 1:
            got = f"{self.samples_per_prompt}, {self.max_new_tokens} and {self.batch_rows}"
            names = "sampler.samples_per_prompt, max_new_tokens, batch_rows"
            raise ConfigError(names, "at least 1", got, "Raise them.")
        if self.backend not in BACKENDS:
            got, do = repr(self.backend), "Change the setting."
            raise ConfigError("sampler.backend", f"one of {BACKENDS}", got, do)
        if self.extra < 0:
            raise ConfigError("sampler.extra", "0 or more", f"{self.extra}", "Change the setting.")
        if self.extra_drawn and not self.extra:
            expected, do = "false without extra tokens", "Set sampler.extra to their number."
            raise ConfigError("sampler.extra_drawn", expected, "true", do)
        if self.dtype not in DTYPES:
            raise ConfigError(
                "sampler.dtype", f"one of {DTYPES}", repr(self.dtype), "Change the setting."
            )
        if not (0 < self.temperature < float("inf") and 0 < self.top_p <= 1 and self.top_k >= 0):
            got = f"{self.temperature}, {self.top_p} and {self.top_k}"
            expected = "a positive number, a probability above 0, and a count of 0 or more"
            raise ConfigError("sampler.temperature, top_p, top_k", expected, got, "Change them.")

    def recorded(self) -> dict[str, Any]:
        """What decides the distribution and what is noted of it; stored with every part and shard.
        Extra ids stand there only if there are any, so that units without keep their names."""
        left_out = {"batch_rows", "device", "backend", "vllm"}
        left_out |= {name for name in ("extra", "extra_drawn") if not getattr(self, name)}
        kept = {k: v for k, v in asdict(self).items() if k not in left_out}
        return {**kept, "behaviour_logprob": "after temperature and filters"}


def notes_likeliest(recorded: Mapping[str, Any]) -> bool:
    """Whether the extra ids of rollouts with these sampler settings are likeliest tokens, which
    stand for no expectation over draws."""
    return bool(recorded.get("extra", 0)) and not recorded.get("extra_drawn", False)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion."""

    completion: np.ndarray
    """(n,) uint32; ends with the stop token if there was one."""
    behaviour_logprob: np.ndarray
    """(n,) float32, nats: log probability of each token where it was drawn, after temperature and
    filters."""
    finish_reason: str
    """stop or length."""
    extra_id: np.ndarray | None = None
    """(n, M) uint32: the likeliest tokens where each one was drawn, or further draws; None if none
    were asked for."""
    extra_behaviour_logprob: np.ndarray | None = None
    """(n, M) float32, nats: theirs, after temperature and filters; -inf where a filter shut one
    out."""


class StudentSampler(Protocol):
    """An engine that samples completions."""

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """Yield (index into prompts, completion), each prompt once, in any order; equal seeds,
        equal completions.

        Raises:
            NumericsError: the model gave NaN or infinite logits.
        """
