"""Cycles: the plan of one round of sampling, made once and stored.

A *unit* is a policy, prompts, sampler settings and a seed; its id is a hash of those, and names the
part that it becomes. A *cycle* is a list of units, with their prompts' token ids: a chat template
may render a prompt otherwise tomorrow, so prompts are rendered once.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.part import prompt_id
from stillroom.cache.store import Cache
from stillroom.replay.prompts import Prompt
from stillroom.replay.sampler import SamplerConfig

MAX_BYTES = jsonfile.MAX_BYTES
MAX_TOKEN_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A planned piece of sampling."""

    policy_version: int
    source: str
    """Who samples: student or teacher."""
    prompt_ids: tuple[int, ...]
    """Prompts, each sampled `samples_per_prompt` times."""
    sampler: dict[str, Any]
    """Settings that decide the distribution."""
    seed: int

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return jsonfile.digest(jsonfile.dump(asdict(self)))[:16]


@dataclass(frozen=True, slots=True)
class Cycle:
    """One round of sampling."""

    units: tuple[Unit, ...]
    prompts: tuple[Prompt, ...] = field(default=(), compare=False)
    """The prompts of all units, as they were rendered when the cycle was planned."""

    def to_json(self) -> bytes:
        """Canonical bytes."""
        units = [asdict(unit) for unit in self.units]
        return jsonfile.dump_sealed({"units": units, "prompts": _pack(self.prompts)})

    @staticmethod
    def from_json(data: bytes, where: str) -> "Cycle":
        """Parse a stored cycle.

        Raises:
            CorruptError: it is not one.
        """
        value = jsonfile.load_sealed(data, where, MAX_BYTES)
        try:
            units = [{**u, "prompt_ids": tuple(u["prompt_ids"])} for u in value["units"]]
            prompts = _unpack(value["prompts"], where)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            do = "Restore the file."
            raise CorruptError(where, "a plan of units", f"no usable {error}", do) from error
        return Cycle(tuple(jsonfile.build(Unit, u, where) for u in units), prompts)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Prompts as a plan stores them."""

    names: list[str | None]
    lengths: list[int]
    """Tokens of each."""
    tokens: str
    """All ids end to end as uint32, through zlib and base64."""


def plan_cycle(
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    *,
    policy_version: int,
    seed: int,
    unit_rollouts: int,
    source: str = "student",
) -> Cycle:
    """Cut prompts into units of at most `unit_rollouts` rollouts (a prompt's samples stay
    together)."""
    if unit_rollouts < 1:
        raise ConfigError("unit_rollouts", "at least 1", f"{unit_rollouts}", "Raise it.")
    size = max(1, unit_rollouts // config.samples_per_prompt)
    groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    units = [
        Unit(
            policy_version=policy_version,
            source=source,
            prompt_ids=tuple(p.id for p in group),
            sampler=config.recorded(),
            seed=seed,
        )
        for group in groups
    ]
    return Cycle(tuple(units), tuple(prompts))


def store_cycle(cache: Cache, name: str, cycle: Cycle) -> Cycle:
    """Store a cycle's plan under a name; the plan that is there first holds, whatever this one is.

    Returns:
        The stored plan.

    Raises:
        InputError: the plan is larger than one that can be read; nothing is stored.
    """
    if has_cycle(cache, name):
        return load_cycle(cache, name)
    data = cycle.to_json()
    _check_readable(data, cache.storage.describe(_path(name)))
    cache.storage.put_new(_path(name), data)
    return load_cycle(cache, name)


def has_cycle(cache: Cache, name: str) -> bool:
    """Whether a cycle of that name is planned."""
    return cache.storage.exists(_path(name))


def load_cycle(cache: Cache, name: str) -> Cycle:
    """Read a stored plan.

    Raises:
        MissingError: there is none of that name.
        CorruptError: it is damaged.
    """
    data = cache.storage.get(_path(name), MAX_BYTES)
    return Cycle.from_json(data, cache.storage.describe(_path(name)))


def _check_readable(data: bytes, where: str) -> None:
    """Refuse the bytes of a plan that no reader would take: too many of them, or of their units or
    tokens."""
    do = "Plan fewer prompts at a time: lower refresh.prompts_per_cycle, or the prompts' limit."
    if len(data) > MAX_BYTES:
        raise InputError(where, f"at most {MAX_BYTES} bytes", f"{len(data)} bytes", do)
    try:
        Cycle.from_json(data, where)
    except CorruptError as error:
        raise InputError(where, error.expected, error.got, do) from error


def _path(name: str) -> str:
    return f"units/{name}.json"


def _pack(prompts: Sequence[Prompt]) -> dict[str, Any]:
    tokens = np.concatenate([np.zeros(0, "<u4"), *(p.token for p in prompts)]).astype("<u4")
    return {
        "names": [p.name for p in prompts],
        "lengths": [len(p.token) for p in prompts],
        "tokens": base64.b64encode(zlib.compress(tokens.tobytes(), 9)).decode(),
    }


def _unpack(value: Any, where: str) -> tuple[Prompt, ...]:
    packed: _Packed = jsonfile.build(_Packed, value, where)
    data = zlib.decompressobj().decompress(base64.b64decode(packed.tokens), MAX_TOKEN_BYTES)
    tokens = np.frombuffer(data, "<u4").astype(np.uint32)
    if min(packed.lengths, default=0) < 0 or sum(packed.lengths) != len(tokens):
        raise ValueError(f"{len(tokens)} prompt tokens of {sum(packed.lengths)}")
    parts = np.split(tokens, list(accumulate(packed.lengths))[:-1]) if packed.lengths else []
    named = zip(parts, packed.names, strict=True)
    return tuple(Prompt(token, prompt_id(token), name) for token, name in named)
