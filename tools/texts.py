"""Token ids as text, for display only: nothing that is decoded here is ever tokenised again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.fingerprint import vocab_fingerprint
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.replay.policies import policy_folder, policy_versions, read_policy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BROKEN = "\ufffd"
WORD_STARTS = ("\u2581", "\u0120")


@dataclass(slots=True)
class Texts:
    """Decodes ids with a tokenizer, or says that there is none."""

    tokenizer: "Tokenizer | None" = None
    notes: list[str] = field(default_factory=list)
    """Why there is none."""

    def token(self, token_id: int) -> str | None:
        """Text of one token, or its piece of the vocabulary where that is part of a character."""
        if self.tokenizer is None:
            return None
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        piece = self.tokenizer.id_to_token(token_id)
        if piece is None or (text and BROKEN not in text and not _lost_space(text, piece)):
            return text
        return f" {text}" if BROKEN not in text and _lost_space(text, piece) else piece

    def text(self, ids: Sequence[int]) -> str | None:
        """Text of a sequence, special tokens included."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def open_texts(cache: Cache, folder: str | None) -> Texts:
    """The tokenizer in a folder, or else that of the cache's first policy or its teacher.

    Raises:
        MissingError: the folder that was named has no tokenizer.json.
        MismatchError: it is not the tokenizer of this cache.
    """
    if folder is not None:
        return Texts(_load(cache, local_path(folder)))
    texts = Texts()
    for place in _places(cache):
        try:
            texts.tokenizer = _load(cache, place)
        except (MissingError, MismatchError, CorruptError) as error:
            texts.notes.append(str(error))
        else:
            texts.notes.clear()
            break
    return texts


def _load(cache: Cache, folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        do = "Name a folder that holds it with --tokenizer."
        raise MissingError(str(path), "the cache's tokenizer", "nothing", do)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        do = "Name another folder with --tokenizer."
        raise CorruptError(str(path), "a tokenizer", str(error), do) from error
    found = vocab_fingerprint(tokenizer.get_vocab(with_added_tokens=True))
    expected = cache.identity.tokenizer_fingerprint
    if found != expected:
        do = "Name the folder of the cache's student or teacher with --tokenizer."
        raise MismatchError(str(path), f"the cache's tokenizer ({expected})", found, do)
    return tokenizer


def _places(cache: Cache) -> Iterator[Path]:
    if 0 in policy_versions(cache.storage):
        yield policy_folder(cache.storage, read_policy(cache.storage, 0))
    identity = cache.identity
    first = identity.ensemble[0] if identity.ensemble else identity.teacher
    yield local_path(first.name)


def _lost_space(text: str, piece: str) -> bool:
    return piece.startswith(WORD_STARTS) and not text.startswith(" ")
