"""docs/several-teachers.md runs: routed caches and a training step on both, an ensemble, and a
teacher with other ids."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stillroom.cache.id_map import id_map_path
from stillroom.cache.identity import Identity
from stillroom.cache.store import Cache
from stillroom.tools.verify import verify
from tests.conftest import VOCAB
from tests.vocabularies import reordered

pytestmark = pytest.mark.usefixtures("quiet_jobs")

DOCUMENT = (Path(__file__).parents[2] / "docs" / "several-teachers.md").read_text()
SMALL = {
    "init": ["--topk", "8", "--teacher.device", "cpu"],
    "rollout": ["--sampler.max-new-tokens", "4", "--sampler.device", "cpu"],
    "score": ["--teacher.device", "cpu"],
    "train": ["--train.device", "cpu", "--train.replay.batch-rows", "2"],
}


def blocks(language: str) -> list[str]:
    """Its listings."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the models, prompts and settings that the document names."""
    models = tmp_path / "models"
    models.mkdir()
    for name, folder in (("math", teacher_dir), ("student", student_dir)):
        shutil.copytree(folder, models / name)
    shutil.copytree(student_dir, models / "general")
    reordered(teacher_dir, models / "reordered", more=["m1", "m2"])
    rows = [json.loads(line) for line in blocks("json")[0].splitlines()]
    rows = [row | {"prompt": f"{row['prompt']} {i}"} for i in range(3) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases, ensemble = blocks("yaml")
    (tmp_path / "phases.yaml").write_text(phases)
    (tmp_path / "both.yaml").write_text(ensemble)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def do(run: Any, block: str) -> list[str]:
    """Run the commands of a listing; returns what each printed."""
    printed = []
    for line in block.strip().splitlines():
        program, command, *args = shlex.split(line)
        assert program == "stillroom"
        ran = run(command, *args, *SMALL[command])
        assert ran.status == 0, ran.err
        printed.append(ran.out)
    return printed


def scored(root: str) -> tuple[Identity, dict[str, np.ndarray]]:
    """The identity of a cache that is sound, and all columns of its one shard."""
    cache = Cache.open(root)
    (part,) = cache.commits()
    assert not verify(cache, deep=True).findings
    return cache.identity, cache.read(part)


def test_routes_and_a_step_on_both(place: Path, run: Any) -> None:
    routed, _, _ = blocks("sh")
    do(run, routed)
    firsts = {}
    for name in ("math", "general"):
        cache = Cache.open(f"caches/{name}")
        (part,) = cache.parts()
        table, _, _ = cache.read_part(part)
        assert table.num_rows == 3
        firsts[name] = {tuple(prompt) for prompt in table["prompt"].to_pylist()}
    assert not firsts["math"] & firsts["general"]

    ran = run("train", "phases.yaml", *SMALL["train"])
    assert ran.status == 0, ran.err
    assert "policy 0 -> 1" in ran.out
    assert yaml.safe_load((place / "phases.yaml").read_text())["train"]["phase_cycles"] == 2

    found: dict[str, Any] = {}
    (code,) = blocks("python")
    exec(code.replace("batch_rows=8", "batch_rows=4"), found)
    assert np.isfinite(found["found"].loss)
    assert found["found"].loss > 0


def test_a_mixture(place: Path, run: Any) -> None:
    _, mixed, _ = blocks("sh")
    do(run, mixed)
    identity, arrays = scored("caches/both")
    weights = {Path(m.name).name: m.weight for m in identity.ensemble}
    assert weights == {"math": pytest.approx(2 / 3), "general": pytest.approx(1 / 3)}
    assert (arrays["topk_count"] == 8).all()
    (canary,) = Cache.open("caches/both").storage.list("canary")
    assert canary.path.startswith("canary/ensemble-2-transformers-")
    other = (place / "both.yaml").read_text().replace("weight: 2", "weight: 3")
    (place / "other.yaml").write_text(other)
    ran = run("score", "other.yaml", *SMALL["score"])
    assert ran.status == 2
    assert "teacher.fingerprint = " in ran.err
    assert "ensemble = [(" in ran.err
    ran = run("score", "--root", "caches/both", "--teacher.model", "models/math")
    assert ran.status == 2
    assert "ensemble = []" in ran.err


def test_a_teacher_with_other_ids(place: Path, run: Any) -> None:
    """And the same teacher with the student's ids gives the same scores, but for its own tokens."""
    _, _, mapped = blocks("sh")
    printed = do(run, mapped)
    assert f"{VOCAB} ids of the student are mapped to the teacher's; 2 tokens that" in printed[0]
    identity, arrays = scored("caches/mapped")
    assert (identity.vocab_size, identity.logit_width) == (VOCAB, VOCAB + 2)
    plain = mapped.replace("mapped", "plain").replace("reordered", "math")
    do(run, plain[: plain.index("stillroom train")])
    own, expected = scored("caches/plain")
    assert own.id_map == ""
    assert (arrays["token"] == expected["token"]).all()
    kept = np.exp(arrays["topk_logprob"].astype(float))
    share = kept / np.exp(expected["topk_logprob"].astype(float))
    assert (share < 1 + 1e-2).all(), "the teacher's own two tokens take their part of every sum"
    sampled = arrays["sampled_logprob"] - expected["sampled_logprob"]
    np.testing.assert_allclose(np.log(share[:, 0]), sampled, atol=2e-2)
    tail = np.exp(arrays["tail_logprob"].astype(float))
    np.testing.assert_allclose(kept.sum(1) + tail, 1, atol=4e-3)


def test_a_map_that_is_gone_is_found(place: Path, run: Any) -> None:
    _, _, mapped = blocks("sh")
    do(run, "\n".join(mapped.splitlines()[:2]))
    cache = Cache.open("caches/mapped")
    path = place / "caches" / "mapped" / id_map_path(cache.identity.id_map)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"vocab_size"', b'"vocab_sizE"'))
    ran = run("score", "--root", "caches/mapped", "--teacher.model", "models/reordered")
    assert ran.status == 2
    assert "expected bytes of the hash" in ran.err
    assert run("verify", "caches/mapped").status == 1
    path.unlink()
    ran = run("verify", "caches/mapped")
    assert ran.status == 1
    assert "the map of the cache's ids is not there" in ran.out
    path.write_bytes(data)
    assert run("verify", "caches/mapped").status == 0
    ran = run("score", "--root", "caches/mapped", "--teacher.model", "models/math")
    assert ran.status == 2
    assert "expected the tokenizer that ids are mapped to" in ran.err
    ran = run("convert", "caches/mapped", "caches/parquet", "--shard-format", "parquet")
    assert ran.status == 0
    assert Cache.open("caches/parquet").id_map() is not None


def test_another_vocabulary_is_refused_before_anything_is_written(place: Path, run: Any) -> None:
    """The student of that command knows tokens that the teacher does not."""
    ran = run(
        "init", "--root", "new", "--teacher.model", "models/math", "--student", "models/reordered"
    )
    assert ran.status == 2
    assert f"2 of its {VOCAB + 2} tokens without a partner, such as 'm" in ran.err
    assert not (place / "new").exists()


def test_run_takes_one_model(place: Path, run: Any) -> None:
    settings = yaml.safe_load((place / "both.yaml").read_text()) | {
        "student": "models/student",
        "output": "out",
        "prompts": {"source": "prompts.jsonl"},
        "held_out": {"source": "prompts.jsonl"},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    ran = run("run", "run.yaml")
    assert ran.status == 2
    assert "teacher.ensemble: expected one model: a run lets its teacher write text" in ran.err
