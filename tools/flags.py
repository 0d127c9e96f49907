"""From a command's arguments to its settings: a YAML file, and flags that win over it."""

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from stillroom.cache.errors import StillroomError
from stillroom.train.settings import load_yaml

STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
REGISTRY = ConstructorRegistry()
FILE_HELP = "FILE.yaml, if given, holds the same settings as key: value. Flags win over it."


def parse_flags(cls: type[Any], args: Sequence[str], prog: str) -> Any:
    """Settings from flags alone.

    Raises:
        StillroomError: a setting is out of range.
        SystemExit: help was asked for (0), or the flags cannot be read (2).
    """
    return _parse(cls, args, prog=prog)


def parse_with_file(cls: type[Any], args: Sequence[str], prog: str) -> Any:
    """Settings from an optional YAML file, which comes first, and from flags.

    The file need not be complete: what it leaves out comes from the flags, or is the default.

    Raises:
        StillroomError: the file cannot be used, or a setting is out of range.
        SystemExit: help was asked for (0), or the flags cannot be read (2).
    """
    shown = {"prog": f"{prog} [FILE.yaml]", "description": f"{cls.__doc__}\n\n{FILE_HELP}"}
    if not args or args[0].startswith("-"):
        return _parse(cls, args, **shown)
    base = load_yaml(cls, args[0], absent=tyro.MISSING)
    return _parse(cls, args[1:], default=base, **shown)


def _parse(cls: type[Any], args: Sequence[str], **options: Any) -> Any:
    """tyro, but what a setting's class refuses is raised: tyro would print half of the message."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            settings = tyro.cli(cls, args=args, config=STYLE, registry=REGISTRY, **options)
    except SystemExit as stop:
        refused = _cause(stop)
        if refused is not None:
            raise refused from None
        sys.stderr.write(messages.getvalue())
        raise
    sys.stderr.write(messages.getvalue())
    return settings


def _cause(error: BaseException | None) -> StillroomError | None:
    while error is not None and not isinstance(error, StillroomError):
        error = error.__context__
    return error


@REGISTRY.primitive_rule
def _json_object(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Mapping[str, Any]] | None:
    """A mapping whose values are not ours to know is one JSON object."""
    if get_origin(info.type) is not Mapping:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: _parse_object(args[0]),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [json.dumps(dict(value))],
    )


def _parse_object(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f'a JSON object such as {{"name": 1}}, not {text!r}')
    return value
