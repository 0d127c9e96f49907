"""What a teacher is to the score job, whichever engine runs it. Needs no torch.

Nouns: a `ScoreRow` is one sequence and the tokens of it to score; `RowScores` is the answer. Entry
t of the answer scores the token at index `targets[t]` given every token before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

import numpy as np

from stillroom.cache.errors import ConfigError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.identity import Identity, TeacherId
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.vllm_config import VllmConfig

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("transformers", "vllm", "server")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Which teacher, and how it runs."""

    model: str
    """Folder of a Hugging Face model with its tokenizer, or a hub id."""
    revision: str | None = None
    """Revision of a hub id."""
    dtype: str = "float32"
    """Compute dtype: float32, bfloat16 or float16. Log probabilities are float32
    whatever it is, from logits of that dtype."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N."""
    max_batch_tokens: int = 8192
    """Tokens of one forward, padding counted; >= 1. A longer sequence goes alone."""
    head_rows: int = 512
    """Positions whose logits are held at once; >= 1."""
    backend: str = "transformers"
    """What runs the model: transformers or vllm in this process, or server."""
    exact_tail: bool = False
    """vLLM: take hidden states from the engine and apply the head here, over the full vocabulary.
    Tails are exact then, and any temperature or extra ids can be had."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Of the backend vllm."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Of the backend server."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.backend not in BACKENDS:
            raise ConfigError(
                "teacher.backend", f"one of {BACKENDS}", repr(self.backend), "Change the setting."
            )
        if self.backend == "server" and not self.server.urls:
            do = "Give the servers' base addresses."
            raise ConfigError("teacher.server.urls", "at least one", "none", do)
        if self.exact_tail and self.backend != "vllm":
            got, do = f"the backend {self.backend}", "Leave it out."
            raise ConfigError("teacher.exact_tail", "the backend vllm", got, do)
        if self.dtype not in DTYPES:
            raise ConfigError(
                "teacher.dtype", f"one of {DTYPES}", repr(self.dtype), "Change the setting."
            )
        if min(self.max_batch_tokens, self.head_rows) < 1:
            got = f"{self.max_batch_tokens} and {self.head_rows}"
            raise ConfigError(
                "teacher.max_batch_tokens, teacher.head_rows", "at least 1", got, "Raise them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSpec:
    """What is kept of each position; the fields are those of the identity."""

    topk: int
    temperature: float = 1.0
    mass: float = 1.0
    extra: int = 0
    extra_kind: str = "none"

    @staticmethod
    def of(identity: Identity) -> "ScoreSpec":
        """What a cache's identity asks for."""
        return ScoreSpec(**{f.name: getattr(identity, f.name) for f in fields(ScoreSpec)})


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One sequence to score."""

    token: np.ndarray
    """(n,) uint32: what the teacher reads, prompt and completion."""
    targets: np.ndarray
    """(p,) int64: indices into token to score, each >= 1, ascending."""
    extra_id: np.ndarray | None = None
    """(p, M) uint32: ids that the student chose; 2**32 - 1 where there are fewer. None where the
    specification asks for none."""
    seed: int = 0
    """Of the draws from the tail, 0 to 2**64 - 1: equal seeds and scores give equal draws."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """The teacher's scores of one row; natural logs over the full vocabulary."""

    topk_id: np.ndarray
    """(p, K) uint32, by rounded logprob descending, then by id; 2**32 - 1 where unused."""
    topk_logprob: np.ndarray
    """(p, K) float16, nats; -inf where unused."""
    topk_count: np.ndarray
    """(p,) uint16: entries that are used, 1 to K; they come first."""
    tail_logprob: np.ndarray
    """(p,) float16, nats: log of the probability outside the used entries, summed before rounding;
    -inf if they are all."""
    sampled_logprob: np.ndarray
    """(p,) float32, nats."""
    extra_id: np.ndarray | None = None
    """(p, M) uint32: draws from the tail, or 2**32 - 1 where it is empty; None unless asked for."""
    extra_logprob: np.ndarray | None = None
    """(p, M) float16, nats: of the row's extra ids or of the draws, -inf where there is none; None
    unless asked for."""
    extra_behaviour_logprob: np.ndarray | None = None
    """(p, M) float32, nats: of the draws, given that they are from the tail; NaN where there is
    none; None unless asked for."""


class Teacher(Protocol):
    """An engine that scores rows."""

    @property
    def numeric_class(self) -> str:
        """Engine, version, dtype and device: what decides the last bits of a score."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Yield (index into rows, scores), each row once, in any order.

        Rows are yielded as they are ready: a part of which none came for ten minutes is open to
        other scorers.

        Raises:
            NumericsError: the model gave NaN or infinite logits; names the row.
        """


def identity_of(
    files: ModelFiles, config: TeacherConfig, spec: ScoreSpec, shard_format: str = "zarr"
) -> Identity:
    """Identity of a cache that this teacher fills.

    Raises:
        ConfigError: a figure of the specification is out of range for it.
    """
    return Identity(
        teacher=TeacherId(
            name=config.model,
            revision=config.revision,
            weight_format=files.weight_format,
            compute_dtype=config.dtype,
            fingerprint=files.fingerprint,
        ),
        tokenizer_fingerprint=files.tokenizer_fingerprint,
        vocab_size=files.vocab_size,
        logit_width=files.logit_width,
        max_length=files.max_length,
        shard_format=shard_format,
        **asdict(spec),
    )
