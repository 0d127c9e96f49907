"""Whether a teacher knows every token of a student, told from their two tokenizers: the exact map
of ids where it does, and what is missing where it does not.

Equal strings are not enough: each token must become the same text in both, and the same text must
become the same tokens. Otherwise the teacher would read, and score, splits that it never saw.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from stillroom.cache.errors import InputError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.id_map import IdMap

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN = 5
BROKEN = "\ufffd"
LINE_TOKENS = 32
STRIDES = (1, 7919)
"""Tokens of the vocabulary stand beside one another in the order of their ids, and then so many
apart."""
TEXTS = (
    "The quick brown fox doesn't jump; IT'S the lazy dog's turn, we'll see.",
    "def f(x: int) -> int:\n    if x > 10:\n\treturn x ** 2  # 3.14159e-05\n\n\n    return x\r\n",
    "1 12 123 1234 12345 123456 1234567.89 0x1F \u0661\u0662\u0663 \u00b2\u00bd",
    "caf\u00e9 cafe\u0301 \ufb01ne \u212b \uff21\uff22\u3000 na\u00efve\u2014\u201cq\u201d\u2026",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b \uc548\ub155\ud558\uc138",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d",
    "\U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 \u2764\ufe0f \x00\x7f\u00a0\u200b",
    "   leading,  double,     five and\ttabs\t\t  trailing   \n \n  \n",
    'https://example.org/a_b-c?d=e&f=%20#g <b>x</b> {"k": [1, 2]} \\frac{a}{b} $x_1^2$',
)


def match_ids(teacher: ModelFiles, student: ModelFiles) -> IdMap | None:
    """The exact map from a student's ids to a teacher's; None where their ids are the same.

    Raises:
        MismatchError: a token of the student has no partner, or the two read text differently; says
            how many, and shows some.
        MissingError: a folder has no tokenizer.json.
    """
    if teacher.tokenizer_fingerprint == student.tokenizer_fingerprint:
        return None
    known, own = _load(teacher), _load(student)
    token = _tokens(own, student)
    known_id = known.get_vocab(with_added_tokens=True)
    where = f"the tokenizers of {teacher.folder} and {student.folder}"
    lost = [name for name in token if name not in known_id]
    if lost:
        raise _no_partner(where, lost, len(token))
    found = np.array([known_id[name] for name in token], np.uint32)
    if len(np.unique(found)) != len(found):
        got, do = "one of the teacher's for several", "Choose another pair."
        raise MismatchError(where, "an id of its own for each token of the student", got, do)
    _check_texts(where, known, own, found)
    _check_reading(where, known, own, found)
    return IdMap(
        teacher_id=found,
        teacher_vocab_size=teacher.vocab_size,
        tokenizer=student.tokenizer_fingerprint,
        teacher_tokenizer=teacher.tokenizer_fingerprint,
    )


def _load(files: ModelFiles) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = files.folder / "tokenizer.json"
    if not path.is_file():
        do = "Save the tokenizer as a fast one, or choose a pair with one tokenizer."
        raise MissingError(str(path), "a tokenizer to map ids with", "nothing", do)
    return Tokenizer.from_file(str(path))


def _tokens(own: "Tokenizer", student: ModelFiles) -> list[str]:
    """Every token of the student by id."""
    by_id = {i: token for token, i in own.get_vocab(with_added_tokens=True).items()}
    holes = [i for i in range(student.vocab_size) if i not in by_id]
    if holes:
        where, do = str(student.folder), "Choose a student with the teacher's tokenizer."
        got = f"{len(holes)} ids without one, such as {holes[:SHOWN]}: no teacher could read them"
        raise InputError(where, "a token for each id", got, do)
    return [by_id[i] for i in range(student.vocab_size)]


def _no_partner(where: str, lost: Sequence[str], size: int) -> MismatchError:
    examples = ", ".join(map(repr, lost[:SHOWN]))
    return MismatchError(
        where,
        "a teacher that knows every token of the student",
        f"{len(lost)} of its {size} tokens without a partner, such as {examples}",
        "Choose a student with the teacher's tokenizer, or a teacher whose vocabulary holds the"
        " student's: scores cannot be carried over to other tokens.",
    )


def _check_texts(where: str, known: "Tokenizer", own: "Tokenizer", found: np.ndarray) -> None:
    """Each token must stand for the same text."""
    mine = own.decode_batch([[i] for i in range(len(found))], skip_special_tokens=False)
    theirs = known.decode_batch([[i] for i in found.tolist()], skip_special_tokens=False)
    differing = [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
    if differing:
        raise MismatchError(
            where,
            "the same text for each token",
            f"other text for {len(differing)}, such as {differing[0][0]!r} and {differing[0][1]!r}",
            "Choose a student with the teacher's tokenizer.",
        )


def _check_reading(where: str, known: "Tokenizer", own: "Tokenizer", found: np.ndarray) -> None:
    """The same text must become the same tokens."""
    lines = [*TEXTS, *_vocabulary_lines(own, len(found)), *_foreign_lines(known, found)]
    mine = own.encode_batch(lines, add_special_tokens=False)
    theirs = known.encode_batch(lines, add_special_tokens=False)
    differing = [
        (ours, other)
        for ours, other in zip(mine, theirs, strict=True)
        if found[np.array(ours.ids, np.int64)].tolist() != other.ids
    ]
    if differing:
        first, second = differing[0]
        pairs = zip(first.tokens, second.tokens, strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        shown = [one.tokens[max(same - 1, 0) : same + 4] for one in (first, second)]
        raise MismatchError(
            where,
            "the same tokens for the same text",
            f"others in {len(differing)} of {len(lines)} lines, such as {shown[0]} and {shown[1]}",
            "Choose a student with the teacher's tokenizer: this teacher would read splits that it"
            " never saw.",
        )


def _foreign_lines(known: "Tokenizer", found: np.ndarray) -> list[str]:
    """Text of each token that only the teacher has: one that it makes of plain text differs."""
    added = known.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    every = set(known.get_vocab(with_added_tokens=True).values())
    text = known.decode_batch([[i] for i in sorted(every - special - set(found.tolist()))])
    return [one for one in text if BROKEN not in one]


def _vocabulary_lines(own: "Tokenizer", size: int) -> Iterator[str]:
    """The student's own tokens as lines of text, in two orders; and each added token alone."""
    added = own.get_added_tokens_decoder()
    piece = own.decode_batch([[i] for i in range(size) if i not in added])
    whole = [text for text in piece if BROKEN not in text]
    for stride in STRIDES:
        ordered = [whole[i * stride % len(whole)] for i in range(len(whole))] if whole else []
        for start in range(0, len(ordered), LINE_TOKENS):
            yield "".join(ordered[start : start + LINE_TOKENS])
    yield from (added[i].content for i in sorted(added))
