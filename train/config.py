"""Settings of training and of `run`, and how any settings dataclass is filled from a YAML file.
Needs no torch."""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.storage import local_path
from stillroom.cache.teacher import ScoreSpec, TeacherConfig
from stillroom.replay.config import ReplayConfig
from stillroom.replay.prompts import PromptsConfig
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig

KINDS = ("forward", "reverse", "jsd")
PRECISIONS = ("no", "bf16")
DEVICES = ("auto", "cpu")
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a student is trained on cached scores."""

    kind: str = "forward"
    """Objective: forward (KL(teacher, student)), reverse, or jsd (generalised Jensen-Shannon)."""
    param: float | None = None
    """For jsd: the teacher's weight beta, between 0 and 1, both excluded."""
    epochs: float = 1.0
    """Passes over the snapshot's rows; > 0. The number of steps is rounded up."""
    learning_rate: float = 1e-5
    """Peak learning rate; > 0."""
    optimizer: str = "AdamW"
    """Name of a class in torch.optim."""
    weight_decay: float = 0.0
    """Weight decay; >= 0."""
    schedule: str = "constant_with_warmup"
    """A transformers schedule: constant_with_warmup, linear, cosine, ..."""
    warmup_steps: int = 0
    """Steps of linear warm-up; >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; > 0, and a large number leaves them as they are."""
    mixed_precision: str = "no"
    """no (float32) or bf16 (float32 weights, bfloat16 products)."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU) or cpu."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; >= 1."""
    drift_every_steps: int = 50
    """Steps between records of drift; >= 1. The last step is always recorded."""
    seed: int = 0
    """Seed of everything random in training but the replay order."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """How rows come to the trainer."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check("train.kind", self.kind in KINDS, f"one of {KINDS}", self.kind)
        if self.kind == "jsd":
            valid = self.param is not None and 0 < self.param < 1
            _check("train.param", valid, "beta between 0 and 1, both excluded", self.param)
        else:
            _check(
                "train.param", self.param is None, f"nothing, as {self.kind} takes none", self.param
            )
        _check(
            "train.mixed_precision",
            self.mixed_precision in PRECISIONS,
            f"one of {PRECISIONS}",
            self.mixed_precision,
        )
        _check("train.device", self.device in DEVICES, f"one of {DEVICES}", self.device)
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            valid = value > 0 and math.isfinite(value)
            _check(f"train.{name}", valid, "a finite number above 0", value)
        for name in ("keep_checkpoints", "drift_every_steps"):
            _check(f"train.{name}", getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("weight_decay", "warmup_steps", "checkpoint_every_steps"):
            value = getattr(self, name)
            valid = value >= 0 and math.isfinite(value)
            _check(f"train.{name}", valid, "a finite number from 0", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The whole loop on one machine: roll out, score, replay and train, publish, refresh, in
    rounds."""

    root: str
    """The cache: a folder."""
    output: str
    """Folder for summaries, logs, checkpoints and the held-out caches."""
    student: str
    """Initial student: folder of a Hugging Face model with its tokenizer, or a hub id."""
    teacher: TeacherConfig
    """The teacher."""
    prompts: PromptsConfig
    """Prompts that rollouts are sampled from."""
    held_out: PromptsConfig
    """Prompts that are only ever used to measure."""
    rounds: int = 2
    """Times to roll out, score, train and publish; >= 1."""
    topk: int = 64
    """K, teacher entries a position; 1 to the vocabulary."""
    temperature: float = 1.0
    """Divides the teacher's and the student's logits in scores and losses; > 0."""
    mass: float = 1.0
    """Of the K likeliest entries the fewest that cover this probability are kept; 0 < mass <= 1,
    and 1 keeps all K."""
    extra: int = 0
    """M, further scored ids a position; 0 to 1024."""
    extra_kind: str = "none"
    """none (M is 0), student (the sampler's sampler.extra likeliest tokens), or tail (the teacher
    draws them from its probability outside the kept entries)."""
    shard_format: str = "zarr"
    """How scores are stored: zarr (smaller and quicker), or parquet (opens in data tools)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How rollouts are sampled."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """How much is sampled each round."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the student is trained each round."""
    accept_numerics: bool = False
    """A person has confirmed an engine, version, dtype or device that is new to the cache."""

    @property
    def score_spec(self) -> ScoreSpec:
        """What the teacher keeps of each position."""
        return ScoreSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ScoreSpec)})

    def __post_init__(self) -> None:
        """Check ranges."""
        _check("rounds", self.rounds >= 1, "at least 1", self.rounds)
        scored = self.extra if self.extra_kind == "student" else 0
        expected = f"at most {scored}, the ids of the student that the cache scores"
        _check("sampler.extra", self.sampler.extra <= scored, expected, self.sampler.extra)
        _check("root", "://" not in self.root, "a folder; run works on one machine", self.root)
        _check(
            "output", Path(self.output) != Path(self.root), "another folder than root", self.output
        )


def load_yaml(cls: type[Any], path: str, *, absent: Any = None) -> Any:
    """Fill a settings dataclass from a YAML file.

    Args:
        cls: the dataclass.
        path: the file.
        absent: as in `build_settings`.

    Raises:
        MissingError: no such file.
        ConfigError: not a mapping, an unknown key (the nearest one is named), a missing or unusable
            value.
    """
    file = local_path(path)
    if not file.is_file():
        raise MissingError(str(file), "a YAML file", "nothing", "Check the path.")
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(str(file), "YAML", cause, "Correct the file.") from error
    return build_settings(cls, values, str(file), absent=absent)


def build_settings(cls: type[Any], values: Any, where: str, *, absent: Any = None) -> Any:
    """Make a settings dataclass from nested mappings.

    Args:
        cls: the dataclass.
        values: its fields; a nested dataclass is a mapping.
        where: names the mapping in messages.
        absent: stands for required values that are not given, in settings that the caller
            completes; ranges are not checked then. None refuses them.

    Raises:
        ConfigError: names the key and what it takes.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            where, f"settings of {cls.__name__} as key: value", repr(values), "Correct it."
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            do = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(fields)}."
            raise ConfigError(
                f"{where}, key {key!r}", f"a setting of {cls.__name__}", "an unknown key", do
            )
    for name, f in fields.items():
        optional = (
            f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        )
        if absent is None and name not in values and not optional:
            raise ConfigError(
                f"{where}, key {name!r}", "a value", "none", f"Add {name}: ... to the settings."
            )
    converted = {
        key: _convert(hints[key], value, f"{where}, key {key!r}", absent)
        for key, value in values.items()
    }
    return cls(**converted) if absent is None else unfinished(cls, converted, absent)


def unfinished(cls: type[Any], values: dict[str, Any], absent: Any) -> Any:
    """Settings that nobody has checked yet, with `absent` where a required value is missing."""
    made, hints = object.__new__(cls), typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in values:
            value = values[f.name]
        elif f.default is not dataclasses.MISSING:
            value = f.default
        elif f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
        else:
            nested = dataclasses.is_dataclass(hints[f.name])
            value = unfinished(hints[f.name], {}, absent) if nested else absent
        object.__setattr__(made, f.name, value)
    return made


def _convert(hint: Any, value: Any, where: str, absent: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_settings(typing.cast(type[Any], hint), value, where, absent=absent)
    if typing.get_origin(hint) is tuple:
        return _convert_list(typing.get_args(hint), value, where, absent)
    if typing.get_origin(hint) is dict:
        return _convert_mapping(typing.get_args(hint), value, where, absent)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, str):
        value = _number(value)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if any(type(value) is kind for kind in allowed):
        return value
    names = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in allowed)
    raise ConfigError(where, names, repr(value), "Correct the value.")


def _convert_list(hints: tuple[Any, ...], value: Any, where: str, absent: Any) -> tuple[Any, ...]:
    """A YAML list as a tuple of so many items, or of any number where the hints end in `...`."""
    if not isinstance(value, list | tuple):
        raise ConfigError(where, "a list", repr(value), "Write it as [a, b].")
    kinds = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
    if len(kinds) != len(value):
        raise ConfigError(where, f"a list of {len(kinds)}", repr(value), "Correct the value.")
    return tuple(
        _convert(kind, item, f"{where}, item {index}", absent)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_mapping(hints: tuple[Any, ...], value: Any, where: str, absent: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(where, "key: value", repr(value), "Write it as {key: value}.")
    return {
        _convert(hints[0], key, f"{where}, key {key!r}", absent): _convert(
            hints[1], item, f"{where}, key {key!r}", absent
        )
        for key, item in value.items()
    }


def _number(text: str) -> float | str:
    """YAML reads 2e-4 as text."""
    try:
        return float(text)
    except ValueError:
        return text


def _check(name: str, valid: bool, expected: str, got: object) -> None:
    if not valid:
        raise ConfigError(name, expected, repr(got), "Change the setting.")
