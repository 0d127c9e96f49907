"""The identity of a cache: which teacher scored it, and how. Written once, compared by every job
that opens it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, MismatchError
from stillroom.cache.schema import FORMAT_VERSION

KNOWN_FEATURES = frozenset[str]()
EXTRA_KINDS = ("none", "student", "tail")
MAX_EXTRA = 1024
SHARD_FORMATS = ("zarr", "parquet")
MAX_TOPK = 65535
FOR_PEOPLE = ("teacher.name", "teacher.revision")
LEFT_OUT: dict[str, Any] = {"ensemble": (), "id_map": ""}
"""Fields that the bytes do not have where they have these values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherId:
    """A teacher model, told from its files."""

    name: str
    revision: str | None
    weight_format: str
    compute_dtype: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberId:
    """One model of an ensemble."""

    name: str
    revision: str | None
    weight_format: str
    fingerprint: str
    weight: float
    """Its share of the probability, above 0; those of all members sum to 1."""


def fingerprint_of(members: Sequence[MemberId]) -> str:
    """Fingerprint of an ensemble: of its members' fingerprints and weights, in their order."""
    return jsonfile.digest(jsonfile.dump([[m.fingerprint, m.weight] for m in members]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Everything that must be equal for scores to be comparable."""

    teacher: TeacherId
    tokenizer_fingerprint: str
    vocab_size: int
    """Ids that the tokenizer knows; probabilities are normalised over these."""
    logit_width: int
    """Rows of the teacher's output head; those from vocab_size on are masked."""
    max_length: int = 2**31 - 1
    """Longest sequence that the teacher reads, prompt and completion, in tokens."""
    temperature: float = 1.0
    """Divides the teacher's logits before the softmax; > 0."""
    topk: int = 64
    """K, entries a position, 1 to vocab_size."""
    mass: float = 1.0
    """Of the K likeliest, the fewest that cover this probability are kept; 0 < mass <= 1, and 1
    keeps all K."""
    extra: int = 0
    """M, further scored ids a position, 0 to MAX_EXTRA."""
    extra_kind: str = "none"
    """Whose they are: none (M is 0), student (the part brings them), or tail (the teacher draws
    them from its probability outside the kept entries)."""
    shard_format: str = "zarr"
    ensemble: tuple[MemberId, ...] = ()
    """Two models or more whose mixture the teacher is; none where it is one model."""
    id_map: str = ""
    """Hash of the object `id_map.json`, which maps the cache's ids to the teacher's; empty where
    they are the same. Tokenizer and vocabulary are then the student's."""
    required_features: tuple[str, ...] = ()
    """What a reader must know beyond the format version; it refuses what it does not."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.topk <= min(self.vocab_size, MAX_TOPK):
            _refuse("topk", f"1 to {min(self.vocab_size, MAX_TOPK)} (the vocabulary)", self.topk)
        if not 0 < self.temperature < float("inf"):
            _refuse("temperature", "a positive number", self.temperature)
        if not 0 < self.mass <= 1:
            _refuse("mass", "a probability above 0", self.mass)
        if not 0 <= self.extra <= MAX_EXTRA:
            _refuse("extra", f"0 to {MAX_EXTRA}", self.extra)
        if self.extra_kind not in EXTRA_KINDS:
            _refuse("extra_kind", f"one of {EXTRA_KINDS}", self.extra_kind)
        if (self.extra == 0) != (self.extra_kind == "none"):
            got = f"{self.extra_kind} with {self.extra} extra ids"
            _refuse("extra_kind", "none without extra ids, student or tail with them", got)
        if self.shard_format not in SHARD_FORMATS:
            _refuse("shard_format", f"one of {SHARD_FORMATS}", self.shard_format)
        if self.logit_width < self.vocab_size:
            _refuse("logit_width", f"at least the tokenizer's {self.vocab_size}", self.logit_width)
        self._check_ensemble()

    def _check_ensemble(self) -> None:
        weights = [member.weight for member in self.ensemble]
        if not weights:
            return
        if len(weights) == 1 or not min(weights) > 0 or not abs(math.fsum(weights) - 1) < 1e-9:
            _refuse("ensemble", "two members or more, weights above 0 that sum to 1", weights)
        if self.teacher.fingerprint != fingerprint_of(self.ensemble):
            expected = "the digest of its members' fingerprints and weights"
            _refuse("teacher.fingerprint", expected, self.teacher.fingerprint)

    @property
    def student_extra(self) -> int:
        """Ids that a part may bring for each completion token: M, or 0 unless they are the
        student's."""
        return self.extra if self.extra_kind == "student" else 0

    def to_json(self) -> bytes:
        """Canonical bytes, as stored in `cache.json`."""
        value = asdict(self)
        kept = {k: v for k, v in value.items() if k not in LEFT_OUT or v != LEFT_OUT[k]}
        return jsonfile.dump_sealed(kept)

    def digest(self) -> str:
        """Hash of the canonical bytes; commits and shards carry it."""
        return jsonfile.digest(self.to_json())

    @staticmethod
    def from_json(data: bytes, where: str) -> "Identity":
        """Parse `cache.json`.

        Raises:
            MismatchError: it was written by another format version, or needs a feature unknown
                here.
            CorruptError: it is not an identity.
        """
        value = jsonfile.load_sealed(data, where)
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            do = "Read it with the version of Stillroom that wrote it."
            raise MismatchError(where, f"format version {FORMAT_VERSION}", f"{version!r}", do)
        empty = [name for name in LEFT_OUT if name in value and not value[name]]
        try:
            unknown = sorted(set(value["required_features"]) - KNOWN_FEATURES)
            if unknown:
                do = "Update Stillroom."
                raise MismatchError(where, "only features known here", f"{unknown}", do)
            value["teacher"] = jsonfile.build(TeacherId, value["teacher"], where)
            value["required_features"] = tuple(value["required_features"])
            members = [jsonfile.build(MemberId, m, where) for m in value.get("ensemble", ())]
            value = {**LEFT_OUT, **value, "ensemble": tuple(members)}
        except (KeyError, TypeError) as error:
            raise CorruptError(
                where, "a cache identity", f"no usable {error}", "Restore the file."
            ) from error
        identity: Identity = jsonfile.build(Identity, value, where)
        if empty:
            expected = "nothing in place of an empty field"
            raise CorruptError(where, expected, ", ".join(empty), "Restore the file.")
        return identity

    def check_same(self, other: "Identity", where: str) -> None:
        """Refuse another identity. A teacher is told by its fingerprint: its name and revision are
        for people, and a folder has other names on other machines.

        Raises:
            MismatchError: names every field that differs.
        """
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        differing = [k for k in mine if k not in FOR_PEOPLE and mine[k] != theirs[k]]
        if differing:
            raise MismatchError(
                where,
                ", ".join(f"{key} = {mine[key]!r}" for key in differing),
                ", ".join(f"{key} = {theirs[key]!r}" for key in differing),
                "A cache holds one teacher's scores: use those settings, or another root.",
            )


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    teacher, members = value.pop("teacher"), value.pop("ensemble")
    told = [(member["fingerprint"], member["weight"]) for member in members]
    named = {f"teacher.{f.name}": teacher[f.name] for f in fields(TeacherId)}
    return {**named, "ensemble": told, **value}


def _refuse(name: str, expected: str, got: object) -> None:
    raise ConfigError(name, expected, repr(got), "Change the setting.")
