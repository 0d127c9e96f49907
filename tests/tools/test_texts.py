"""Display text: the right tokenizer or none, and pieces of characters and of words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from stillroom.cache.store import Cache
from stillroom.tools.texts import Texts


def forget_tokenizers(root: Path) -> None:
    """Make a root name no folder that is there."""
    (root / "policies" / "000000.json").unlink()
    identity = Cache.open(root).identity
    identity = replace(identity, teacher=replace(identity.teacher, name="not/here"))
    (root / "cache.json").write_bytes(identity.to_json())


def test_ids_and_a_note_without_a_tokenizer(damaged: Path, run: Any) -> None:
    forget_tokenizers(damaged)
    part = "v000000-0000000000000004"
    value = run("show", damaged, part, "--json").json()
    assert value["completion"] is None
    assert "not/here" in value["notes"][0]
    out = run("show", damaged, part).out
    assert out.startswith("note: ")
    assert "  | " + " ".join(map(str, value["completion_ids"])) in out


def test_named_tokenizer(damaged: Path, teacher_dir: Path, run: Any) -> None:
    forget_tokenizers(damaged)
    part = "v000000-0000000000000004"
    flags = ("show", damaged, part, "--json", "--tokenizer")
    assert run(*flags, teacher_dir).json()["completion"].startswith("abc ")
    assert run(*flags, damaged).status == 2


def test_another_tokenizer_is_refused(made_root: Path, tmp_path: Path, run: Any) -> None:
    Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    ran = run("show", made_root, "--tokenizer", tmp_path)
    assert ran.status == 2
    assert "the cache's tokenizer" in ran.err


def test_broken_tokenizer_is_refused(made_root: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    assert run("show", made_root, "--tokenizer", tmp_path).status == 2


def test_part_of_a_character_shows_its_piece(teacher_dir: Path) -> None:
    texts = Texts(Tokenizer.from_file(str(teacher_dir / "tokenizer.json")))
    assert texts.tokenizer is not None
    first, second = texts.tokenizer.encode("\u00e9").ids
    assert texts.text([first, second]) == "\u00e9"
    assert [texts.token(first), texts.token(second)] == ["\u00c3", "\u00a9"]


def test_space_that_the_decoder_drops_is_kept() -> None:
    tokenizer = Tokenizer(models.WordLevel(vocab={"\u2581the": 0, "x": 1}, unk_token="x"))
    tokenizer.decoder = decoders.Metaspace()
    texts = Texts(tokenizer)
    assert [texts.token(0), texts.token(1)] == [" the", "x"]
    assert texts.token(7) == ""
