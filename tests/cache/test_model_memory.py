"""Whether a model fits: its weights' bytes from the files, against what is free."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from stillroom.cache import model_memory
from stillroom.cache.causal_lm import load_causal_lm
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.model_memory import check_fits, free_bytes, weight_bytes
from tests.conftest import save_llama

CPU = torch.device("cpu")


def test_bytes_are_those_of_the_loaded_weights(teacher_dir: Path) -> None:
    files = inspect_model(str(teacher_dir))
    stored = sum(tensor.size for tensor in load_file(teacher_dir / "model.safetensors").values())
    for dtype, width in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        model = load_causal_lm(files, dtype, CPU)
        loaded = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        assert weight_bytes(files, dtype) == stored * width == sum(loaded.values())


def test_quantised_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    path = save_llama(tmp_path, seed=0) / "config.json"
    stored = weight_bytes(inspect_model(str(tmp_path)), "float32")
    settings = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert weight_bytes(inspect_model(str(tmp_path)), "bfloat16") == stored


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = inspect_model(str(teacher_dir))
    needed = weight_bytes(files, "float32")
    monkeypatch.setattr(model_memory, "free_bytes", lambda: needed)
    check_fits(files, "float32", CPU)
    monkeypatch.setattr(model_memory, "free_bytes", lambda: needed - 1)
    check_fits(files, "bfloat16", CPU)
    monkeypatch.setattr(
        "stillroom.cache.causal_lm.AutoModelForCausalLM.from_pretrained",
        lambda *_, **__: pytest.fail("it was loaded"),
    )
    with pytest.raises(InputError, match=r"GB that are free in main memory; got .* GB in float32"):
        load_causal_lm(files, "float32", CPU)
    monkeypatch.setattr(model_memory, "free_bytes", lambda: None)
    check_fits(files, "float32", CPU)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(model_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(model_memory, "CGROUP", tmp_path)
    assert free_bytes() == 8000 * 1024
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 4000000\ninactive_file 1000000\n")
    for most, expected in (
        ("6000000", 2_000_000),
        ("max", 8000 * 1024),
        ("1000000000", 8000 * 1024),
    ):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert free_bytes() == expected
    monkeypatch.setattr(model_memory, "MEMINFO", tmp_path / "nothing")
    assert free_bytes() is None
