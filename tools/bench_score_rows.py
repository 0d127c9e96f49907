"""What scoring is measured on: the quickstart's prompts as they stand, end to end, cut into rows of
one length."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillroom.cache.errors import InputError, MissingError
from stillroom.cache.teacher import ScoreRow, TeacherConfig
from stillroom.tools.bench_train_rows import MADE_BY, Sizes


@dataclass(frozen=True, slots=True)
class Scored:
    """What is scored, and by whom."""

    rows: list[ScoreRow]
    config: TeacherConfig
    topk: int
    """K."""
    threads: int


def text_rows(models: Path, sizes: Sizes) -> list[ScoreRow]:
    """Rows of text; the tokens behind the first `sizes.prompt` are scored.

    Args:
        models: the folder that the quickstart's `prepare.py` made.
        sizes: of the rows.

    Raises:
        MissingError: the teacher or the prompts are not there.
        InputError: there is too little text.
    """
    for name in ("teacher", "prompts.jsonl", "held_out.jsonl"):
        if not (models / name).exists():
            raise MissingError(str(models / name), "the quickstart's", "nothing", MADE_BY)
    token = _tokens(models)
    length = sizes.prompt + sizes.completion
    if len(token) < sizes.rows * length:
        expected, got = f"{sizes.rows} rows of {length} tokens", f"{len(token)} tokens"
        raise InputError(str(models / "prompts.jsonl"), expected, got, "Ask for fewer or shorter.")
    targets = np.arange(sizes.prompt, length)
    return [ScoreRow(token[i * length :][:length], targets) for i in range(sizes.rows)]


def _tokens(models: Path) -> np.ndarray:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "teacher" / "tokenizer.json"))
    texts = "\n".join(_texts(models))
    return np.array(tokenizer.encode(texts, add_special_tokens=False).ids, np.uint32)


def _texts(models: Path) -> Iterator[str]:
    for name in ("prompts.jsonl", "held_out.jsonl"):
        for line in (models / name).read_text().splitlines():
            yield from (message["content"] for message in json.loads(line)["messages"])
