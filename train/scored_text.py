"""Text as token ids with a mask of those that are learned: all of a document, the completion of a
prompt, the assistant's turns of a conversation."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache.errors import InputError, first_line
from stillroom.replay.text_rows import are_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\b")
"""How a chat template marks what the assistant generates."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Tokens of a row."""

    token: np.ndarray
    """(n,) uint32."""
    scored: np.ndarray
    """(n,) bool: which are learned; never the first, which nothing predicts."""


def document(text: Any, tokenizer: "PreTrainedTokenizerBase", where: str) -> ScoredText:
    """All of a text, as the tokenizer renders it, and the end-of-sequence token.

    Raises:
        InputError: it is no text, or the tokenizer has no end-of-sequence token.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(where, "text", repr(text)[:80], "Leave the row out.")
    ids = _with_eos(tokenizer(text, verbose=False)["input_ids"], tokenizer, where)
    return _scored(ids, np.ones(len(ids), bool))


def completion(
    prompt: Any, answer: Any, tokenizer: "PreTrainedTokenizerBase", where: str
) -> ScoredText:
    """A prompt and what is to be answered: text, or messages each.

    With a chat template, text is one message of the user and one of the assistant. Without one, the
    two are tokenised apart, as in sampling, and the end-of-sequence token comes last.

    Raises:
        InputError: one of them is empty, or they cannot be rendered.
    """
    for value in (prompt, answer):
        if not value or (isinstance(value, str) and not value.strip()):
            expected = "a prompt and a completion"
            raise InputError(where, expected, "an empty one", "Leave the row out.")
    if isinstance(prompt, str) and isinstance(answer, str) and tokenizer.chat_template is None:
        before = tokenizer(prompt, verbose=False)["input_ids"]
        after = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        ids = _with_eos([*before, *after], tokenizer, where)
        return _scored(ids, np.arange(len(ids)) >= len(before))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else answer
    if not (are_messages(asked) and are_messages(said)):
        do = "Give text, or messages as a list of {'role': ..., 'content': ...}."
        got = f"{prompt!r:.40} and {answer!r:.40}"
        raise InputError(where, "text or messages as prompt and completion", got, do)
    return conversation([*asked, *said], tokenizer, where, len(asked))


def conversation(
    messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str, first: int = 0
) -> ScoredText:
    """A chat as its template renders it, of which the assistant's turns are learned.

    They are what the template marks as generated; where it marks nothing, what a turn adds to the
    turns before it, up to the end-of-sequence token. The ids are those of the whole chat, tokenised
    once.

    Args:
        messages: the chat.
        tokenizer: with a chat template.
        where: names the row in messages.
        first: index of the first message that may be learned.

    Raises:
        InputError: there is no template, no turn of the assistant, or a turn is not rendered as the
            same ids with the turns after it.
    """
    if not are_messages(messages) or not messages:
        do = "Give messages as a list of {'role': ..., 'content': ...}."
        raise InputError(where, "messages", repr(messages)[:80], do)
    if tokenizer.chat_template is None:
        do = "Use a column 'text', or a tokenizer with a chat template."
        raise InputError(where, "text, as the tokenizer has no chat template", "messages", do)
    if all(message["role"] != ASSISTANT for message in messages[first:]):
        got = ", ".join(str(message["role"]) for message in messages[first:])
        raise InputError(where, "a turn of the assistant", got, "Leave the row out.")
    try:
        return _rendered(messages, tokenizer, where, first)
    except InputError:
        raise
    except Exception as error:
        do, expected = "Correct the row.", "messages that the chat template takes"
        raise InputError(where, expected, first_line(error), do) from error


def _rendered(
    messages: list[Any], tokenizer: "PreTrainedTokenizerBase", where: str, first: int
) -> ScoredText:
    if MARKED.search(str(tokenizer.get_chat_template())):
        marked: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, scored = marked["input_ids"], np.array(marked["assistant_masks"], bool)
        scored[: len(_checked(messages[:first], ids, tokenizer, where)) if first else 0] = False
        return _scored(ids, scored)
    ids = _ids(messages, tokenizer)
    scored = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT or i < first:
            continue
        start = len(_checked(messages[:i], ids, tokenizer, where, asking=True))
        turn = _checked(messages[: i + 1], ids, tokenizer, where)[start:]
        ends = turn.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in turn else None
        scored[start : start + len(turn[:ends])] = True
    return _scored(ids, scored)


def _checked(
    messages: list[Any],
    ids: list[int],
    tokenizer: "PreTrainedTokenizerBase",
    where: str,
    *,
    asking: bool = False,
) -> list[int]:
    """The ids of the first messages, which the ids of the whole chat must begin with."""
    found = _ids(messages, tokenizer, asking=asking)
    if ids[: len(found)] != found:
        at = next(i for i, id in enumerate([*found, -1]) if i >= len(ids) or ids[i] != id)
        do = "Use a chat template with {% generation %} around what the assistant says."
        expected = f"the first {len(messages)} messages as the same ids alone and in the whole chat"
        raise InputError(where, expected, f"other ones from token {at}", do)
    return found


def _ids(
    messages: list[Any], tokenizer: "PreTrainedTokenizerBase", *, asking: bool = False
) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=asking, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _with_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase", where: str) -> list[int]:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        expected = "a tokenizer with an end-of-sequence token"
        raise InputError(where, expected, f"{eos}", "Set eos_token in its configuration.")
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _scored(ids: list[int], scored: np.ndarray) -> ScoredText:
    scored[:1] = False
    return ScoredText(np.asarray(ids, np.uint32), scored)
