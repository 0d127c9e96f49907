"""Rows of text: which columns are taken, and what is a message."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from stillroom.cache.errors import InputError, MissingError
from stillroom.replay.text_rows import are_messages, first_column, parse_messages, read_rows


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face datasets caches what it reads; not in the user's folders."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_rows_are_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in "abc"))
    assert read_rows(str(path), "train", None)["text"][:] == ["a", "b", "c"]
    assert read_rows(str(path), "train", 2)["text"][:] == ["a", "b"]
    with pytest.raises(MissingError, match=r"absent\.csv: expected a file of rows"):
        read_rows(str(tmp_path / "absent.csv"), "train", None)


def test_the_first_wanted_column_that_is_there() -> None:
    assert first_column(["b", "c"], ("a", "c", "b"), "file", "setting") == "c"
    with pytest.raises(InputError, match=r"file: expected a column a or d; got \['b'\].*setting"):
        first_column(["b"], ("a", "d"), "file", "setting")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"role": "user", "content": "a"}], True),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], True),
        ([{"role": "assistant", "content": None}], False),
        ([{"content": "a"}], False),
        ("a", False),
        (["a"], False),
    ],
)
def test_messages_have_a_role_and_something_said(value: Any, expected: bool) -> None:
    assert are_messages(value) is expected
    assert are_messages(parse_messages(json.dumps(value))) is expected


def test_text_that_is_not_json_is_no_messages() -> None:
    assert not are_messages(parse_messages("hello there"))
