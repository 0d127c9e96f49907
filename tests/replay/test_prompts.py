"""Prompts: every format and column, rendered once, and clear refusals."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stillroom.cache.errors import ConfigError, InputError, MissingError
from stillroom.cache.part import prompt_id
from stillroom.replay.prompts import Prompts, PromptsConfig, load_prompts

ROOM = 100
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "abc?"},
    {"role": "assistant", "content": "def."},
    {"role": "user", "content": "more"},
]
BEGIN = "<|system|>"

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face datasets caches what it reads; not in the user's folders."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def tokenizer(student_dir: Path) -> PreTrainedTokenizerBase:
    """The student's, with a chat template."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(student_dir)
    return tokenizer


@pytest.fixture
def plain_tokenizer(student_dir: Path) -> PreTrainedTokenizerBase:
    """One without a chat template that puts a special token before every text."""
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    tokenizer.chat_template = None
    token = (BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[token]
    )
    assert tokenizer("x")["input_ids"][0] == token[1]
    return tokenizer


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write rows to a file of prompts."""

    def write(rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
        path = tmp_path / f"prompts{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".json":
            path.write_text(json.dumps(rows))
        elif suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
        return path

    return write


def load(
    path: Path | str, tokenizer: PreTrainedTokenizerBase, room: int = ROOM, **settings: Any
) -> Prompts:
    """Load prompts with a few settings."""
    return load_prompts(PromptsConfig(source=str(path), **settings), tokenizer, room)


def texts(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the model reads."""
    return [str(tokenizer.decode(prompt.token.tolist())) for prompt in prompts.prompts]


def as_user(text: str) -> str:
    """A text as the one user message of the template."""
    return f"<|user|>{text}<|end|><|assistant|>"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("column", ["prompt", "text"])
def test_plain_text_becomes_one_user_message(
    suffix: str, column: str, save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt_name": f"n{i}", column: f"Say abc, {i}!"} for i in range(3)]
    loaded = load(save(rows, suffix), tokenizer)
    assert texts(loaded, tokenizer) == [as_user(f"Say abc, {i}!") for i in range(3)]
    assert [prompt.name for prompt in loaded.prompts] == ["n0", "n1", "n2"]
    assert loaded.num_too_long == 0
    for prompt in loaded.prompts:
        assert prompt.token.dtype == np.uint32
        assert prompt.id == prompt_id(prompt.token)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_prompts_of_one_route_are_taken(
    suffix: str, save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    """By the text of the column, whatever its type."""
    path = save([{"prompt": f"p{i}", "teacher": "ab"[i % 2], "n": i % 3} for i in range(6)], suffix)

    def taken(column: str, route: str, **settings: Any) -> list[str]:
        loaded = load(path, tokenizer, route_column=column, route=route, **settings)
        return texts(loaded, tokenizer)

    assert taken("teacher", "a") == [as_user(f"p{i}") for i in (0, 2, 4)]
    assert taken("teacher", "b", limit=3) == [as_user("p1")]
    assert taken("n", "2") == [as_user("p2"), as_user("p5")]


def test_a_route_that_is_not_there_is_refused(
    save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = save([{"prompt": "p", "teacher": name} for name in ("math", "general")])
    with pytest.raises(InputError, match=r"'teacher'.*'maths'; got rows of \['general', 'math'\]"):
        load(path, tokenizer, route_column="teacher", route="maths")
    with pytest.raises(InputError, match=r"a column model; got \['prompt', 'teacher'\]"):
        load(path, tokenizer, route_column="model", route="math")


@pytest.mark.parametrize("half", [{"route": "math"}, {"route_column": "teacher"}])
def test_half_a_route_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^prompts\.route_column, prompts\.route: expected both"):
        PromptsConfig(source="p.jsonl", **half)  # type: ignore[arg-type]


def test_an_error_names_the_row_of_the_file(save: Save, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": text, "teacher": name} for text, name in (("p", "a"), ("p", "b"), ("", "b"))]
    with pytest.raises(InputError, match=r"prompts\.jsonl, row 2: expected a prompt; got an empty"):
        load(save(rows), tokenizer, route_column="teacher", route="b")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_messages_are_rendered_as_they_are(
    suffix: str, column: str, save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded = load(save([{column: CHAT}, {column: CHAT[1:2]}], suffix), tokenizer)
    whole = "<|system|>Be brief.<|end|><|user|>abc?<|end|><|assistant|>def.<|end|>"
    assert texts(loaded, tokenizer) == [whole + as_user("more"), as_user("abc?")]
    assert [prompt.name for prompt in loaded.prompts] == [None, None]


def test_the_template_is_applied_once(
    save: Save, tokenizer: PreTrainedTokenizerBase, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also where the tokenizer itself puts a special token first, as the template does."""
    plain_tokenizer.chat_template = BEGIN + str(tokenizer.chat_template)
    for each in (tokenizer, plain_tokenizer):
        (prompt,) = load(save([{"messages": CHAT[1:]}]), each).prompts
        expected: Any = each.apply_chat_template(CHAT[1:], add_generation_prompt=True)
        assert prompt.token.tolist() == expected["input_ids"]
        begin = each.convert_tokens_to_ids(BEGIN)
        assert prompt.token.tolist().count(begin) == (each is plain_tokenizer)


def test_without_a_template_text_is_tokenised_as_the_tokenizer_does(
    save: Save, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded = load(save([{"text": "abc "}]), plain_tokenizer)
    assert texts(loaded, plain_tokenizer) == [f"{BEGIN}abc "]
    with pytest.raises(InputError, match=r"row 0: expected plain text.*got messages"):
        load(save([{"messages": CHAT}]), plain_tokenizer)


def test_the_first_known_column_is_taken_unless_one_is_named(
    save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = save([{"text": "t", "prompt": "p", "messages": CHAT[1:2], "other": "o"}])
    assert texts(load(path, tokenizer), tokenizer) == [as_user("abc?")]
    assert texts(load(path, tokenizer, column="prompt"), tokenizer) == [as_user("p")]
    assert texts(load(path, tokenizer, column="text"), tokenizer) == [as_user("t")]


def test_no_usable_column_lists_what_is_there(
    save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = save([{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"messages or prompt or text; got \['answer', 'question'"):
        load(path, tokenizer)
    with pytest.raises(InputError, match="a column text; got"):
        load(save([{"prompt": "p"}]), tokenizer, column="text")


def test_too_long_prompts_are_left_out_and_counted(
    save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = save([{"prompt": "x" * n} for n in (3, 60, 4, 61, 5)])
    extra = len(load(path, tokenizer).prompts[0].token) - 3
    loaded = load(path, tokenizer, max_tokens=4 + extra)
    assert texts(loaded, tokenizer) == [as_user("xxx"), as_user("xxxx")]
    assert loaded.num_too_long == 3
    assert load(path, tokenizer, room=60 + extra).num_too_long == 1
    assert load(path, tokenizer, room=60 + extra, max_tokens=5 + extra).num_too_long == 2


def test_nothing_that_fits_is_an_error_that_says_the_shortest(
    save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = save([{"prompt": "x" * 50}, {"prompt": "x" * 30}])
    shortest = min(len(p.token) for p in load(path, tokenizer).prompts)
    with pytest.raises(InputError, match=f"at most 20 tokens.*the shortest has {shortest}"):
        load(path, tokenizer, room=20)


@pytest.mark.parametrize("room", [0, -5])
def test_no_room_for_a_prompt_is_a_setting_error(
    save: Save, tokenizer: PreTrainedTokenizerBase, room: int
) -> None:
    with pytest.raises(ConfigError, match=f"got {room} tokens left"):
        load(save([{"prompt": "abc"}]), tokenizer, room=room)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_an_empty_file_is_refused(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    with pytest.raises(InputError, match="an empty file"):
        load(path, tokenizer)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_without_rows_is_refused(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / f"none{suffix}"
    table = pa.table({"prompt": pa.array([], pa.string())})
    writer = pq.write_table if suffix == ".parquet" else pyarrow.csv.write_csv
    writer(table, path)
    with pytest.raises(InputError, match="none"):
        load(path, tokenizer)


@pytest.mark.parametrize("value", ["", "  \n", None])
def test_an_empty_row_is_named(
    value: str | None, save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError, match="row 1: expected a prompt; got an empty one"):
        load(save([{"prompt": "abc"}, {"prompt": value}]), tokenizer)


def test_an_empty_conversation_is_named(save: Save, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="row 1: expected a prompt; got an empty one"):
        load(save([{"messages": CHAT}, {"messages": []}]), tokenizer)


@pytest.mark.parametrize("value", [12, 1.5, {"role": "user"}, ["abc"]])
def test_a_row_that_is_neither_text_nor_messages_is_named(
    value: Any, save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError, match="row 0: expected text or messages"):
        load(save([{"prompt": value}]), tokenizer)


@pytest.mark.parametrize(
    "message", [{"from": "human", "value": "hi"}, {"role": "user"}, {"content": "hi"}]
)
def test_messages_of_another_shape_are_named(
    message: dict[str, str], save: Save, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The template would render what is not there as nothing."""
    with pytest.raises(InputError, match="row 1: expected text or messages"):
        load(save([{"messages": CHAT}, {"messages": [message]}]), tokenizer)


def test_messages_that_the_template_refuses_are_named(
    save: Save, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    plain_tokenizer.chat_template = "{{ raise_exception('users first') }}"
    with pytest.raises(InputError, match=r"messages that the chat template takes.*users first"):
        load(save([{"messages": CHAT}]), plain_tokenizer)


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(MissingError, match=r"absent\.jsonl"):
        load(tmp_path / "absent.jsonl", tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_another_format_is_refused(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / f"wrong{suffix}"
    path.write_bytes(b"\x00\x01 not what its name says {")
    with pytest.raises(InputError, match="wrong"):
        load(path, tokenizer)


def test_an_unreachable_hub_id_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no-one/no-such-prompts"):
        load("no-one/no-such-prompts", tokenizer)


def test_duplicates_collapse_to_the_first(save: Save, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt_name": str(i), "prompt": t} for i, t in enumerate("abacba")]
    loaded = load(save(rows), tokenizer)
    assert [prompt.name for prompt in loaded.prompts] == ["0", "1", "3"]
    assert texts(loaded, tokenizer) == [as_user(t) for t in "abc"]
    assert loaded.num_too_long == 0


def test_limit_reads_from_the_start(save: Save, tokenizer: PreTrainedTokenizerBase) -> None:
    path = save([{"prompt": t} for t in "abcde"])
    assert texts(load(path, tokenizer, limit=2), tokenizer) == [as_user("a"), as_user("b")]
    assert len(load(path, tokenizer, limit=99).prompts) == 5


def test_a_changed_file_is_read_anew(save: Save, tokenizer: PreTrainedTokenizerBase) -> None:
    assert texts(load(save([{"prompt": "a"}]), tokenizer), tokenizer) == [as_user("a")]
    assert texts(load(save([{"prompt": "b"}]), tokenizer), tokenizer) == [as_user("b")]


@pytest.mark.parametrize("wrong", [{"column": "question"}, {"limit": 0}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"prompts.*{next(iter(wrong))}"):
        PromptsConfig(source="prompts.jsonl", **wrong)


def test_messages_as_json_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """CSV can hold messages in no other way; text that is not JSON is refused, not sent."""
    chat = [{"role": "user", "content": "count: abc"}]
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(chat)], [json.dumps(chat)]])
    loaded = load_prompts(PromptsConfig(source=str(path)), tokenizer, 100)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.prompts[0].token.tolist() == expected
    assert (len(loaded.prompts), loaded.num_duplicates) == (1, 1)
    path.write_text("messages\nhello there\n")
    with pytest.raises(InputError, match="row 0: expected text or messages"):
        load_prompts(PromptsConfig(source=str(path)), tokenizer, 100)
