"""What commands print: plain lines, tables and JSON.

Text from elsewhere is made safe for a terminal. A row of a table is one line, however wide. Colour
is used only on a terminal.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNBOUNDED = 100_000
NOTHING = "-"


def plain(text: str, keep: str = "") -> str:
    """Escape every character that does not print, control characters and marks of direction too.

    Args:
        text: from a cache, a tokenizer or a message.
        keep: characters that are left as they are.
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def say(text: str = "") -> None:
    """Print one line."""
    print(plain(text))


def print_json(value: Any) -> None:
    """Print JSON; numbers that JSON does not have become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text: Sequence[str] = (),
    strong: Sequence[int] = (),
) -> None:
    """Print a table.

    Args:
        columns: headings, with units.
        rows: cells; numbers as `number` gives them.
        text: headings of the columns that are aligned left.
        strong: rows that stand out on a terminal.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        left = name in text
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [Text(plain(number(cell))) for cell in row]
        table.add_row(*cells, style="bold" if i in strong else None)
    _Quiet().print(table)


def number(value: object) -> str:
    """A cell: thousands apart, floats with four significant digits, `-` for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class _Quiet(Console):
    """A console that leaves a broken pipe to the command line; rich would exit with 1."""

    def __init__(self) -> None:
        super().__init__(width=UNBOUNDED, highlight=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
