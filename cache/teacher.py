"""What a teacher is to the score job, whichever engine runs it. Needs no torch.

Nouns: a `ScoreRow` is one sequence and the tokens of it to score; `RowScores` is the answer. Entry
t of the answer scores the token at index `targets[t]` given every token before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Protocol

import numpy as np

from stillroom.cache.ensemble_config import Member, check_weight, shares
from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.id_map import IdMap
from stillroom.cache.identity import Identity, MemberId, TeacherId, fingerprint_of
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.vllm_config import VllmConfig

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("transformers", "vllm", "server")
MOST_MORE = 1024
"""Entries that engines and servers are asked for beyond K, one for each id that only the teacher
has."""


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
    weight: float = 1.0
    """Share of this model where there is an ensemble; > 0. Only ratios count, of the decimals as
    they are written."""
    ensemble: tuple[Member, ...] = ()
    """Further models with the same tokenizer: the teacher is then the mixture of all of their
    probabilities. Backend, dtype and all other settings are shared."""
    ensemble_topk: int | None = None
    """Entries that are asked of each member where the backend gives no full vocabulary; None is
    twice those that are kept."""

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
        self._check_ensemble()
        if min(self.max_batch_tokens, self.head_rows) < 1:
            got = f"{self.max_batch_tokens} and {self.head_rows}"
            raise ConfigError(
                "teacher.max_batch_tokens, teacher.head_rows", "at least 1", got, "Raise them."
            )

    def _check_ensemble(self) -> None:
        check_weight("teacher.weight", self.weight)
        if not self.ensemble and (self.weight != 1 or self.ensemble_topk is not None):
            got, do = f"{self.weight} and {self.ensemble_topk}", "Leave them out."
            names = "teacher.weight, teacher.ensemble_topk"
            raise ConfigError(names, "nothing without teacher.ensemble", got, do)
        if self.ensemble_topk is not None and self.ensemble_topk < 1:
            got, do = f"{self.ensemble_topk}", "Raise it."
            raise ConfigError("teacher.ensemble_topk", "at least 1", got, do)
        for member in self.ensemble:
            if member.served_model is not None and self.backend != "server":
                got, do = f"{member.served_model} of {member.model}", "Leave it out."
                raise ConfigError("teacher.ensemble, served_model", "the backend server", got, do)
            if bool(member.urls) != (self.backend == "server"):
                expected = "servers of each member with the backend server, and none otherwise"
                got, do = f"{len(member.urls)} of {member.model}", "Change the setting."
                raise ConfigError("teacher.ensemble, urls", expected, got, do)

    def members(self) -> list["TeacherConfig"]:
        """Settings of each model of an ensemble alone, this one first."""
        alone = replace(self, ensemble=(), weight=1.0, ensemble_topk=None)
        return [alone] + [
            replace(
                alone,
                model=member.model,
                revision=member.revision,
                server=replace(self.server, urls=member.urls, model=member.served_model),
            )
            for member in self.ensemble
        ]

    def shares(self) -> tuple[float, ...]:
        """Share of each model, this one first; their sum is 1."""
        return shares([self.weight, *(member.weight for member in self.ensemble)])


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
    """(p,) float16, nats: log of the probability outside the used entries, as exact as the engine
    tells it; -inf if they are all, or if it told nothing of the rest."""
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


def stats_of(teacher: Teacher) -> dict[str, float]:
    """What a teacher tells of its work since it was loaded, by name; nothing where it does not.

    An engine may have a method `stats() -> Mapping[str, float]`, which is called while rows are
    scored. Known names are `model_s`, seconds in which its model ran; `tokens_in_flight`, of the
    requests under way; `servers`, those that answer; and `retries`, requests that were sent again.
    """
    tell = getattr(teacher, "stats", None)
    return {} if tell is None else dict(tell())


def longest_row_of(teacher: Teacher) -> int | None:
    """Tokens of the longest row that a teacher reads, prompt and completion; None where it does not
    tell.

    An engine may have a property `longest_row`; it should where it may read less than its model.
    """
    longest: int | None = getattr(teacher, "longest_row", None)
    return longest


def identity_of(
    files: ModelFiles,
    config: TeacherConfig,
    spec: ScoreSpec,
    shard_format: str = "zarr",
    id_map: IdMap | None = None,
) -> Identity:
    """Identity of a cache that this teacher fills.

    Args:
        files: the teacher's, as `load_teacher.inspect_teacher` gives them.
        config: how it runs.
        spec: what is kept of each position.
        shard_format: how scores are stored.
        id_map: from the ids that the cache holds to the teacher's; None where they are the same.

    Raises:
        ConfigError: a figure of the specification is out of range for it, or cannot be had from
            this backend.
        MismatchError: the map is to another teacher's ids.
    """
    _check_extra(config, spec, id_map)
    _check_more(config, id_map)
    if id_map is not None and id_map.teacher_tokenizer != files.tokenizer_fingerprint:
        expected = f"the tokenizer that ids are mapped to ({id_map.teacher_tokenizer})"
        do = "Use the teacher that the cache was made with, with its tokenizer."
        raise MismatchError(str(files.folder), expected, files.tokenizer_fingerprint, do)
    every = (files, *files.members)
    if len(every) != len(config.ensemble) + 1:
        got, do = f"{len(files.members)}", "Inspect it with inspect_teacher(config)."
        raise ConfigError("teacher.ensemble", f"files of {len(config.ensemble)} members", got, do)
    members = _member_ids(every, config) if config.ensemble else ()
    return Identity(
        teacher=TeacherId(
            name=" + ".join(one.model for one in config.members()),
            revision=None if members else config.revision,
            weight_format="+".join(dict.fromkeys(one.weight_format for one in every)),
            compute_dtype=config.dtype,
            fingerprint=fingerprint_of(members) if members else files.fingerprint,
        ),
        ensemble=members,
        tokenizer_fingerprint=id_map.tokenizer if id_map else files.tokenizer_fingerprint,
        vocab_size=id_map.vocab_size if id_map else files.vocab_size,
        logit_width=files.logit_width,
        max_length=min(one.max_length for one in every),
        shard_format=shard_format,
        id_map=id_map.digest() if id_map else "",
        **asdict(spec),
    )


def _member_ids(every: Sequence[ModelFiles], config: TeacherConfig) -> tuple[MemberId, ...]:
    return tuple(
        MemberId(
            name=one.model,
            revision=one.revision,
            weight_format=files.weight_format,
            fingerprint=files.fingerprint,
            weight=share,
        )
        for files, one, share in zip(every, config.members(), config.shares(), strict=True)
    )


def _check_extra(config: TeacherConfig, spec: ScoreSpec, id_map: IdMap | None) -> None:
    """Refuse extra ids that would not have the probabilities that the format promises."""
    if spec.extra_kind == "tail" and id_map is not None and len(id_map.teacher_only):
        got = f"a teacher with {len(id_map.teacher_only)} tokens that the student does not have"
        do = "Take ids of the student, or none: a draw could be a token that it cannot have."
        raise ConfigError("extra_kind", "none or student", got, do)
    if spec.extra_kind != "none" and config.ensemble and config.backend != "transformers":
        got, do = f"the backend {config.backend}", "Leave extra ids out, or run the members here."
        raise ConfigError("extra_kind", "none, or an ensemble of transformers", got, do)


def _check_more(config: TeacherConfig, id_map: IdMap | None) -> None:
    """Refuse a backend that would have to list too many ids that only the teacher has."""
    more = 0 if id_map is None else len(id_map.teacher_only)
    if more > MOST_MORE and config.backend != "transformers":
        got = f"the backend {config.backend}, and {more} ids that only the teacher has"
        do = "Run the teacher with the backend transformers, which gives its whole vocabulary."
        raise ConfigError("teacher.backend", f"at most {MOST_MORE} of them", got, do)
