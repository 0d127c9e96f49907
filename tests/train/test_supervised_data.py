"""Datasets to fine-tune on: every form, cut where that is right, and clear refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stillroom.cache.errors import ConfigError, InputError
from stillroom.train.scored_text import ScoredText
from stillroom.train.supervised_data import (
    SupervisedConfig,
    SupervisedRows,
    _pieces,
    load_supervised,
)
from tests.conftest import save_tokenizer

CHAT = [{"role": "user", "content": "abc?"}, {"role": "assistant", "content": "abcd."}]

Load = Callable[..., SupervisedRows]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture
def load(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> Load:
    """Writes rows to a file and loads that."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def loaded(rows: list[dict[str, Any]], suffix: str = ".jsonl", **given: Any) -> SupervisedRows:
        path = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return load_supervised(SupervisedConfig(source=str(path), **given), tokenizer)

    return loaded


def texts(rows: SupervisedRows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each row as text."""
    pairs = zip(rows.start, rows.start[1:], strict=False)
    return [str(tokenizer.decode(rows.token[a:b].tolist())) for a, b in pairs]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_form(suffix: str, load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = "<|user|>abc?<|end|><|assistant|>abcd.<|end|>"
    row = {"text": "xyz", "messages": CHAT, "prompt": "abc?", "completion": "abcd."}
    for column, expected, positions in (
        (None, chat, 4),
        ("messages", chat, 4),
        ("completion", chat, 4),
        ("text", "xyz<|end|>", 3),
    ):
        rows = load([row] * 2, suffix, column=column)
        assert texts(rows, tokenizer) == [expected] * 2
        assert rows.positions.tolist() == [positions] * 2
        assert rows.lengths.sum() == len(rows.token) == len(rows.scored)
        assert (rows.left_out, rows.truncated, rows.missing) == ({}, 0, "")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 60), st.integers(2, 20))
def test_every_token_of_a_document_but_the_first_is_learned_once(length: int, limit: int) -> None:
    scored = np.ones(length, bool)
    scored[0] = False
    whole = ScoredText(np.arange(length, dtype=np.uint32), scored)
    pieces = _pieces(whole, limit)
    learned = np.concatenate([piece.token[piece.scored] for piece in pieces])
    assert learned.tolist() == list(range(1, length))
    assert all(2 <= len(piece.token) <= limit for piece in pieces)
    assert all((np.diff(piece.token) == 1).all() for piece in pieces)


def test_long_documents_are_cut(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = load([{"text": "0123456789"}, {"text": "01"}], max_length=5)
    assert texts(rows, tokenizer) == ["01234", "45678", "89<|end|>", "01<|end|>"]
    assert rows.positions.tolist() == [4, 4, 2, 2]


def test_over_long_chats(load: Load) -> None:
    chats = [{"prompt": "p" * n, "completion": "abcd"} for n in (1, 5, 10)]
    with pytest.raises(InputError, match=r"row 1: expected at most 9 tokens; got 11"):
        load(chats, max_length=9)
    rows = load(chats, max_length=9, over_long="skip")
    assert (len(rows), rows.left_out) == (1, {"over_long": 2})
    rows = load(chats, max_length=9, over_long="truncate")
    assert (rows.left_out, rows.truncated) == ({"no_position": 1}, 1)
    assert rows.lengths.tolist() == [7, 9]
    assert rows.positions.tolist() == [3, 1]
    assert rows.missing == "rows left out: 1 by no_position; 1 truncated"


def test_nothing_left_is_an_error(load: Load) -> None:
    with pytest.raises(InputError, match=r"a row of at most 4 tokens; got none"):
        load([{"prompt": "abcdefg", "completion": "x"}], max_length=4, over_long="skip")


def test_refusals_name_the_row(load: Load) -> None:
    with pytest.raises(InputError, match=r"row 1: expected text"):
        load([{"text": "a"}, {"text": ""}])
    with pytest.raises(InputError, match=r"prompt beside completion; got \['completion'\]"):
        load([{"completion": "a"}])
    with pytest.raises(InputError, match=r"messages or completion or text; got \['question'\]"):
        load([{"question": "a"}])


def test_the_digest_tells_rows_apart(load: Load) -> None:
    first = load([{"prompt": "a", "completion": "b"}]).digest
    assert load([{"prompt": "a", "completion": "b"}]).digest == first
    assert load([{"prompt": "a", "completion": "c"}]).digest != first
    both = [{"role": role, "content": c} for role, c in (("user", "a"), ("assistant", "b"))]
    asked_again = [*both, *both]
    whole = load([{"messages": asked_again}])
    last = load([{"prompt": asked_again[:3], "completion": asked_again[3:]}])
    assert whole.token.tolist() == last.token.tolist()
    assert whole.digest != last.digest, "other tokens are learned"


@pytest.mark.parametrize(
    "wrong",
    [
        {"column": "question"},
        {"limit": 0},
        {"max_length": 1},
        {"max_length": 10, "max_tokens": 9},
        {"batch_rows": 0},
        {"over_long": "cut"},
        {"last_batch": "lose"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"supervised\.{next(iter(wrong))}"):
        SupervisedConfig(source="rows.jsonl", **wrong)
