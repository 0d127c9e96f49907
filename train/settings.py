"""How a settings dataclass is filled from nested mappings, such as a YAML file. Needs no torch."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.storage import local_path


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


def convert_fields(settings: Any, where: str) -> None:
    """Give each field of a settings dataclass the type that it is declared with, for its
    `__post_init__`: what a YAML file may hold is converted likewise.

    Args:
        settings: the dataclass.
        where: what comes before its fields' names in messages.

    Raises:
        ConfigError: names the field and what it takes.
    """
    for name, hint in typing.get_type_hints(type(settings)).items():
        value = _convert(hint, getattr(settings, name), f"{where}.{name}", None)
        object.__setattr__(settings, name, value)


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
        if isinstance(value, typing.cast(type[Any], hint)):
            return value
        return build_settings(typing.cast(type[Any], hint), value, where, absent=absent)
    if typing.get_origin(hint) is tuple:
        return _convert_list(typing.get_args(hint), value, where, absent)
    if typing.get_origin(hint) is dict:
        return _convert_mapping(typing.get_args(hint), value, where, absent)
    if typing.get_origin(hint) is Mapping:
        return _checked_mapping(value, where)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    nested = [kind for kind in allowed if dataclasses.is_dataclass(kind)]
    if nested and value is not None:
        return _convert(nested[0], value, where, absent)
    listed = [kind for kind in allowed if typing.get_origin(kind) is tuple]
    if listed and isinstance(value, list | tuple):
        return _convert(listed[0], value, where, absent)
    if float in allowed and isinstance(value, str):
        value = _number(value)
    whole = int in allowed and type(value) is int
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in allowed and number and not whole:
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


def _checked_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping whose values are not ours to know."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(where, "name: value", repr(value), "Write it as {name: value}.")
    return value


def _number(text: str) -> float | str:
    """YAML reads 2e-4 as text."""
    try:
        return float(text)
    except ValueError:
        return text


def check_setting(name: str, valid: bool, expected: str, got: object) -> None:
    """Refuse a value out of its range.

    Raises:
        ConfigError: if it is not valid.
    """
    if not valid:
        raise ConfigError(name, expected, repr(got), "Change the setting.")
