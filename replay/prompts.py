"""Prompts: read through Hugging Face datasets, rendered once to token ids.

A row has `messages` (chat), or `prompt` or `text` (plain, taken as one user message where the
tokenizer has a chat template). Prompts that are too long are left out and counted, never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.part import prompt_id
from stillroom.replay.text_rows import are_messages, first_column, parse_messages, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("messages", "prompt", "text")
SHOWN_ROUTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsConfig:
    """Where prompts come from."""

    source: str
    """A .jsonl, .json, .parquet or .csv file, or a hub id."""
    split: str = "train"
    """Split of a hub id."""
    column: str | None = None
    """messages, prompt or text; None takes the first of these that is there."""
    limit: int | None = None
    """Rows to read from the start; None for all."""
    route_column: str | None = None
    """Column that says which cache a prompt is for, such as the name of a teacher."""
    route: str | None = None
    """Value of that column whose prompts are taken; all others are for other caches."""
    max_tokens: int = 1024
    """Longest prompt, in tokens; longer ones are left out and counted."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.column is not None and self.column not in COLUMNS:
            raise ConfigError(
                "prompts.column", f"one of {COLUMNS}", repr(self.column), "Change it."
            )
        if (self.route_column is None) != (self.route is None):
            names, got = "prompts.route_column, prompts.route", f"{self.route_column}, {self.route}"
            raise ConfigError(names, "both or neither", got, "Give both, or leave both out.")
        if self.max_tokens < 1 or (self.limit is not None and self.limit < 1):
            got = f"{self.max_tokens} and {self.limit}"
            raise ConfigError("prompts.max_tokens, prompts.limit", "at least 1", got, "Raise them.")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt."""

    token: np.ndarray
    """(n,) uint32."""
    id: int
    """Hash of the token ids."""
    name: str | None
    """The row's `prompt_name`, if it has one."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts that can be used, and how many could not."""

    prompts: tuple[Prompt, ...]
    num_too_long: int
    num_duplicates: int = 0
    """Prompts that render to the same ids as an earlier one, and were left out."""


def load_prompts(config: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", room: int) -> Prompts:
    """Read and render prompts.

    Args:
        config: where they are.
        tokenizer: the student's.
        room: longest prompt, in tokens, that leaves the models room for a completion.

    Raises:
        MissingError: the file is not there.
        InputError: no row, no usable column, no row of the route, an empty prompt, or none that
            fits.
        ConfigError: no room at all.
    """
    if room < 1:
        do = "Ask for shorter completions (sampler.max_new_tokens)."
        got = f"{room} tokens left for a prompt"
        raise ConfigError("sampler.max_new_tokens", "room for a prompt and its completion", got, do)
    rows, numbers = _routed(read_rows(config.source, config.split, config.limit), config)
    wanted = [config.column] if config.column else COLUMNS
    column = first_column(rows.column_names, wanted, config.source, "prompts.column")
    chats = column == "messages"
    rendered = [
        _render(parse_messages(value) if chats else value, tokenizer, f"{config.source}, row {i}")
        for i, value in zip(numbers, rows[column], strict=True)
    ]
    names = rows["prompt_name"] if "prompt_name" in rows.column_names else [None] * len(rendered)
    longest = min(config.max_tokens, room)
    prompts = [
        Prompt(ids, prompt_id(ids), None if name is None else str(name))
        for ids, name in zip(rendered, names, strict=True)
        if len(ids) <= longest
    ]
    if not prompts:
        shortest = min(len(ids) for ids in rendered)
        do = "Raise prompts.max_tokens, lower sampler.max_new_tokens, or use shorter prompts."
        expected = f"a prompt of at most {longest} tokens, which leaves room for a completion"
        raise InputError(config.source, expected, f"none; the shortest has {shortest}", do)
    unique = _unique(prompts)
    too_long, duplicates = len(rendered) - len(prompts), len(prompts) - len(unique)
    return Prompts(tuple(unique), too_long, duplicates)


def _routed(rows: Any, config: PromptsConfig) -> tuple[Any, Sequence[int]]:
    """The rows whose route is the settings', and their numbers in the source."""
    if config.route_column is None:
        return rows, range(len(rows))
    first_column(rows.column_names, [config.route_column], config.source, "prompts.route_column")
    routes = [str(value) for value in rows[config.route_column]]
    chosen = [i for i, route in enumerate(routes) if route == config.route]
    if not chosen:
        got = f"rows of {sorted(set(routes))[:SHOWN_ROUTES]}"
        where = f"{config.source}, column {config.route_column!r}"
        do = "Set prompts.route to one of them."
        raise InputError(where, f"a row of {config.route!r}", got, do)
    return rows.select(chosen), chosen


def _render(value: Any, tokenizer: "PreTrainedTokenizerBase", where: str) -> np.ndarray:
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(where, "a prompt", "an empty one", "Leave the row out.")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not are_messages(messages):
        do = "Give text, or messages as a list of {'role': ..., 'content': ...}."
        raise InputError(where, "text or messages", repr(value)[:80], do)
    try:
        if tokenizer.chat_template is not None:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(value, str):
            ids = tokenizer(value)["input_ids"]
        else:
            do = "Use a column 'prompt' or 'text', or a tokenizer with a chat template."
            raise InputError(
                where, "plain text, as the tokenizer has no chat template", "messages", do
            )
    except InputError:
        raise
    except Exception as error:
        do = "Give messages as a list of {'role': ..., 'content': ...}."
        raise InputError(where, "messages that the chat template takes", str(error), do) from error
    if not ids:
        raise InputError(where, "a prompt", "one that renders to no token", "Leave the row out.")
    return np.asarray(ids, np.uint32)


def _unique(prompts: list[Prompt]) -> list[Prompt]:
    first: dict[int, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.id, prompt)
    return list(first.values())
