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


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the control groups', of a machine with 8,192,000 bytes to spare."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(model_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(model_memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(model_memory, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def limit(folder: Path, most: str, used: int = 5_000_000) -> None:
    """A control group of version 2, a million of whose bytes are idle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 4000000\ninactive_file 1000000\n")


def test_a_container_s_limit_counts(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes() == 8000 * 1024
    for most, expected in (
        ("6000000", 2_000_000),
        ("max", 8000 * 1024),
        ("1000000000", 8000 * 1024),
    ):
        limit(system / "cgroup", most)
        assert free_bytes() == expected
    monkeypatch.setattr(model_memory, "MEMINFO", system / "nothing")
    limit(system / "cgroup", "max")
    assert free_bytes() is None


@pytest.mark.parametrize("where", ["slurm/job_1/step_0", "slurm/job_1", "slurm"])
def test_limits_above_this_process_count(system: Path, where: str) -> None:
    (system / "own").write_text("0::/slurm/job_1/step_0\n")
    limit(system / "cgroup", "max")
    limit(system / "cgroup" / "slurm/job_1/step_0", "90000000")
    limit(system / "cgroup" / where, "7000000")
    limit(system / "cgroup" / "slurm/job_2", "5000000")
    assert free_bytes() == 3_000_000


def test_limits_of_version_1_count(system: Path) -> None:
    (system / "own").write_text("5:cpu,cpuacct:/x\n3:memory:/docker/abc\n0::/\n")
    for name, most in (("", 2**63 - 4096), ("docker", 2**63 - 4096), ("docker/abc", 6_000_000)):
        folder = system / "cgroup" / "memory" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
        (folder / "memory.usage_in_bytes").write_text("5000000\n")
        (folder / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 1000000\n")
    assert free_bytes() == 2_000_000
    (system / "own").write_text("3:memory:/../../elsewhere\n")
    assert free_bytes() == 8000 * 1024
