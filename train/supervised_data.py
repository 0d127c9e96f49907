"""Datasets to fine-tune on, as token ids in memory: documents, prompts with completions, or chats.

A row of `text` is a document: every token is learned, the end-of-sequence token too. Of `prompt`
and `completion` the completion is learned, of `messages` the assistant's turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import InputError
from stillroom.replay.place import LAST_BATCHES
from stillroom.replay.selection import NO_POSITION, OVER_LONG
from stillroom.replay.text_rows import first_column, parse_messages, read_rows
from stillroom.train.scored_text import ScoredText, completion, conversation, document
from stillroom.train.settings import check_setting, convert_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("messages", "completion", "text")
LEAST = ("max_length", "batch_rows", "max_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig:
    """A dataset to fine-tune on, and how it comes to a trainer."""

    source: str
    """A .jsonl, .json, .parquet or .csv file, or a hub id."""
    split: str = "train"
    """Split of a hub id."""
    column: str | None = None
    """messages, completion (beside prompt), or text; None takes the first of these that is
    there."""
    limit: int | None = None
    """Rows to read from the start; None for all."""
    max_length: int = 1024
    """Tokens of a row, at most max_tokens; >= 2. Longer documents are cut into several, each of
    which begins with the last token of the one before, so that every token but the first of a
    document is learned once."""
    over_long: str = "refuse"
    """Longer chats and completions: refuse, skip, or truncate."""
    batch_rows: int = 16
    """Rows of a step over all ranks; 1 to all rows."""
    max_tokens: int = 8192
    """Tokens of a packed micro-batch."""
    last_batch: str = "keep"
    """Rows at an epoch's end that fill no batch: keep (a short one), drop, or carry (filled up from
    the next epoch)."""
    seed: int = 0
    """Seed of the order, which is another one in every epoch."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        convert_fields(self, "supervised")
        self._check("column", self.column in (None, *COLUMNS), f"one of {COLUMNS}")
        self._check("limit", self.limit is None or self.limit >= 1, "at least 1")
        for name in LEAST:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        valid = 2 <= self.max_length <= self.max_tokens
        self._check("max_length", valid, f"2 to max_tokens, {self.max_tokens}")
        self._check("over_long", self.over_long in OVER_LONG, f"one of {OVER_LONG}")
        self._check("last_batch", self.last_batch in LAST_BATCHES, f"one of {LAST_BATCHES}")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        check_setting(f"supervised.{name}", valid, expected, getattr(self, name))


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """All rows, in memory: 5 bytes a token and 16 a row."""

    token: np.ndarray
    """(N,) uint32, rows end to end."""
    scored: np.ndarray
    """(N,) bool: tokens that are learned."""
    start: np.ndarray
    """(S + 1,) int64: first token of each row; the last entry is N."""
    positions: np.ndarray
    """(S,) int64: tokens of each row that are learned; >= 1."""
    left_out: dict[str, int]
    """Rows of the dataset that are not here: `over_long`, or `no_position` (nothing to learn, or
    nothing is left of a truncated row)."""
    truncated: int
    """Rows that lost their last tokens."""

    def __len__(self) -> int:
        """S; pieces of a document count as rows."""
        return len(self.positions)

    @property
    def lengths(self) -> np.ndarray:
        """(S,) int64: tokens of each row."""
        return np.diff(self.start)

    @property
    def digest(self) -> str:
        """Hash of the tokens and of what is learned: 32 hexadecimal digits."""
        arrays = (self.token, "<u4"), (self.scored, "u1"), (self.start, "<i8")
        hashes = [jsonfile.digest(array.astype(dtype).tobytes()) for array, dtype in arrays]
        return jsonfile.digest(jsonfile.dump(hashes))

    @property
    def missing(self) -> str:
        """What is not trained on, for a person; empty if every row is, whole."""
        reasons = ", ".join(f"{count:,} by {name}" for name, count in self.left_out.items())
        said = [f"rows left out: {reasons}"] if reasons else []
        return "; ".join(said + [f"{self.truncated:,} truncated"] * (self.truncated > 0))


def load_supervised(
    config: SupervisedConfig, tokenizer: "PreTrainedTokenizerBase"
) -> SupervisedRows:
    """Read a dataset and render it.

    Args:
        config: where it is.
        tokenizer: the student's.

    Raises:
        MissingError: the file is not there.
        InputError: no row, no usable column, a row that cannot be rendered, one that is too long
            where that is refused, or none is left.
    """
    rows = read_rows(config.source, config.split, config.limit)
    wanted = [config.column] if config.column else COLUMNS
    column = first_column(rows.column_names, wanted, config.source, "supervised.column")
    kept: list[ScoredText] = []
    left_out = {"over_long": 0, NO_POSITION: 0}
    truncated = 0
    for where, text in _rendered(rows, column, tokenizer, config.source):
        if not text.scored.any():
            left_out[NO_POSITION] += 1
        elif len(text.token) <= config.max_length:
            kept.append(text)
        elif column == "text":
            kept += _pieces(text, config.max_length)
        elif config.over_long == "refuse":
            expected = f"at most {config.max_length} tokens"
            do = "Raise max_length, or set over_long to skip or truncate."
            raise InputError(where, expected, f"{len(text.token)}", do)
        elif config.over_long == "skip":
            left_out["over_long"] += 1
        elif text.scored[: config.max_length].any():
            kept.append(_cut(text, 0, config.max_length))
            truncated += 1
        else:
            left_out[NO_POSITION] += 1
    if not kept:
        do = "Raise max_length, or use shorter rows."
        expected = f"a row of at most {config.max_length} tokens"
        raise InputError(config.source, expected, "none", do)
    return _together(kept, {k: n for k, n in left_out.items() if n}, truncated)


def _rendered(
    rows: Any, column: str, tokenizer: "PreTrainedTokenizerBase", source: str
) -> Iterator[tuple[str, ScoredText]]:
    if column == "completion" and "prompt" not in rows.column_names:
        do = "Add it, or use a column 'text'."
        got = f"{sorted(rows.column_names)}"
        raise InputError(source, "a column prompt beside completion", got, do)
    columns = [column, "prompt"] if column == "completion" else [column]
    for i, row in enumerate(rows.select_columns(columns)):
        where, value = f"{source}, row {i}", row[column]
        if column == "text":
            yield where, document(value, tokenizer, where)
        elif column == "messages":
            yield where, conversation(parse_messages(value), tokenizer, where)
        else:
            yield where, completion(row["prompt"], value, tokenizer, where)


def _pieces(text: ScoredText, length: int) -> list[ScoredText]:
    """Rows of at most `length` tokens that have one token in common with the next."""
    starts = range(0, len(text.token) - 1, length - 1)
    return [_cut(text, start, start + length) for start in starts]


def _cut(text: ScoredText, start: int, stop: int) -> ScoredText:
    scored = text.scored[start:stop].copy()
    scored[:1] = False
    return ScoredText(text.token[start:stop], scored)


def _together(
    texts: Sequence[ScoredText], left_out: dict[str, int], truncated: int
) -> SupervisedRows:
    start = np.cumsum([0, *(len(text.token) for text in texts)])
    positions = np.array([int(text.scored.sum()) for text in texts])
    token = np.concatenate([text.token for text in texts])
    scored = np.concatenate([text.scored for text in texts])
    return SupervisedRows(token, scored, start, positions, left_out, truncated)
