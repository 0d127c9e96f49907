"""Whether two model folders hold the same model with other weights: one can then take the other's
place in an engine that runs."""

from typing import Any

from stillroom.cache.errors import InputError, MismatchError, first_line
from stillroom.cache.fingerprint import VOLATILE_CONFIG, ModelFiles, tensors_of

HEAD = "lm_head."
"""Begins the names of tensors that a folder may leave out where they are tied to others."""


def check_same_model(first: ModelFiles, second: ModelFiles) -> None:
    """Refuse a folder whose settings, vocabulary or tensors are others.

    Args:
        first: the model that is there.
        second: what is to take its place.

    Raises:
        MismatchError: names what differs.
    """
    where, do = str(second.folder), "Start another engine for it."
    mine, theirs = _settings(first), _settings(second)
    names = [n for n in sorted(mine.keys() | theirs.keys()) if mine.get(n) != theirs.get(n)]
    if first.tokenizer_fingerprint != second.tokenizer_fingerprint:
        names.append("the tokenizer")
    if names:
        raise MismatchError(where, f"the settings of {first.folder}", f"other {names}", do)
    here, there = _shapes(first), _shapes(second)
    differing = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if first.config.get("tie_word_embeddings") or mine.get("tie_word_embeddings"):
        differing = [name for name in differing if not name.startswith(HEAD)]
    if differing:
        name = differing[0]
        expected = f"{name} of the shape {here.get(name)}"
        raise MismatchError(where, expected, f"{there.get(name)}", do)


def _settings(files: ModelFiles) -> dict[str, Any]:
    """As this version of transformers reads them: an older one may have written them otherwise."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        do = "Save the model again."
        raise InputError(str(files.folder), "a model", first_line(error), do) from error
    return {name: v for name, v in config.to_dict().items() if name not in VOLATILE_CONFIG}


def _shapes(files: ModelFiles) -> dict[str, list[int]]:
    return {name: entry["shape"] for name, (_, entry) in tensors_of(files.folder).items()}
