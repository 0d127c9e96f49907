"""Text as ids and what is learned of it: exactly documents, completions and assistants' turns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stillroom.cache.errors import InputError
from stillroom.train.scored_text import ScoredText, completion, conversation, document
from tests.conftest import save_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "abc?"},
    {"role": "assistant", "content": "abcd."},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m['content'] }}<|end|>"
    "{%- endgeneration -%}{%- else -%}{{ m['content'] }}<|end|>{%- endif -%}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AFTER_THE_END = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORTENED = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'][:1] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """With a chat template that marks nothing."""
    save_tokenizer(tmp_path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    return tokenizer


def learned(text: ScoredText, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The stretches that are learned, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], text.scored, [0]]).astype(int)))
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [str(tokenizer.decode(text.token[a:b].tolist())) for a, b in pairs]


def test_all_of_a_document_but_its_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    text = document("xabc\n", tokenizer, "row 0")
    assert str(tokenizer.decode(text.token.tolist())) == "xabc\n<|end|>"
    assert learned(text, tokenizer) == ["abc\n<|end|>"]
    assert text.token.dtype == np.uint32


def test_no_second_end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    token = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[token]
    )
    assert document("x", tokenizer, "row 0").token.tolist() == [ord("x") - 33, token[1]]


@pytest.mark.parametrize("template", [None, MARKED, AFTER_THE_END])
def test_turns_of_the_assistant(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """The end-of-sequence token is learned; what a template writes after it is not."""
    tokenizer.chat_template = template or tokenizer.chat_template
    text = conversation(CHAT, tokenizer, "row 0")
    whole: Any = tokenizer.apply_chat_template(CHAT)
    assert text.token.tolist() == whole["input_ids"]
    assert learned(text, tokenizer) == ["abcd.<|end|>", "no<|end|>"]


@pytest.mark.parametrize("template", [None, MARKED])
def test_only_turns_from_the_first_on(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    text = completion(CHAT[:4], CHAT[4:], tokenizer, "row 0")
    assert text.token.tolist() == conversation(CHAT, tokenizer, "row 0").token.tolist()
    assert learned(text, tokenizer) == ["no<|end|>"]


def test_a_prompt_and_its_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    text = completion("ab", "c", tokenizer, "row 0")
    assert str(tokenizer.decode(text.token.tolist())) == "<|user|>ab<|end|><|assistant|>c<|end|>"
    assert learned(text, tokenizer) == ["c<|end|>"]
    tokenizer.chat_template = None
    text = completion("ab", "c", tokenizer, "row 0")
    assert str(tokenizer.decode(text.token.tolist())) == "abc<|end|>"
    assert len(text.token) == 3, "tokens do not reach over from the prompt"
    assert learned(text, tokenizer) == ["c<|end|>"]


def test_a_template_that_changes_earlier_turns_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = SHORTENED
    with pytest.raises(InputError, match=r"row 7: expected the first 3 messages as the same ids"):
        conversation(CHAT, tokenizer, "row 7")
    assert learned(conversation(CHAT[:3], tokenizer, "row 7"), tokenizer) == ["abcd.<|end|>"]


@pytest.mark.parametrize("value", ["", " \n", None, 3, ["a"]])
def test_what_is_no_document(tokenizer: PreTrainedTokenizerBase, value: Any) -> None:
    with pytest.raises(InputError, match="row 0: expected text"):
        document(value, tokenizer, "row 0")


@pytest.mark.parametrize(
    ("prompt", "answer"), [("", "a"), ("a", ""), ("a", [3]), ({}, "a"), (3, "a")]
)
def test_what_is_no_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any
) -> None:
    with pytest.raises(InputError, match=r"row 0: expected (text or messages|a prompt)"):
        completion(prompt, answer, tokenizer, "row 0")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected messages"),
        ([{"role": "assistant"}], "expected messages"),
        (CHAT[:2], "a turn of the assistant; got system, user"),
        ("text", "expected messages"),
    ],
)
def test_what_is_no_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        conversation(messages, tokenizer, "row 0")


def test_tokenizers_that_cannot(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('users first') }}"
    with pytest.raises(InputError, match=r"row 0: .*users first"):
        conversation(CHAT, tokenizer, "row 0")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        conversation(CHAT, tokenizer, "row 0")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-sequence"):
        document("abc", tokenizer, "row 0")
