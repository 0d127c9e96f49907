"""The code about Parquet in docs/reading-shards.md runs, and finds what was scored."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.example_shards import random_shard
from stillroom.cache.parquet_shard import ParquetFormat
from stillroom.cache.schema import FINISH_REASONS, Arrays
from stillroom.cache.testing_shard import stored_shard

DOCUMENT = Path(__file__).parents[1] / "docs" / "reading-shards.md"
RUN = """
import json, pathlib, sys
found = {"path": pathlib.Path(sys.argv[1])}
for block in json.loads(sys.argv[2]):
    exec(block, found)
found["difference"] = found["difference"].rows()
names = sys.argv[3].split(",")
print(json.dumps({name: found[name] for name in names}))
"""
FOUND = (
    "attributes",
    "completion",
    "scored",
    "entries",
    "stopped",
    "likeliest",
    "difference",
    "positions",
    "kept",
)


def blocks(heading: str) -> list[str]:
    """Code in a section of the document."""
    parts = re.split(r"^## (.+)\n", DOCUMENT.read_text(), flags=re.MULTILINE)
    section = dict(zip(parts[1::2], parts[2::2], strict=True))[heading]
    return re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """A shard of twelve sequences, whose behaviour is known."""
    made = random_shard(2, 300, 12, topk=6, vocab_size=90, mass=True)
    made["behaviour_logprob"] = made["sampled_logprob"] + np.float32(0.25)
    return made


@pytest.fixture(scope="module")
def found(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the blocks of the Parquet section leave behind, run one after another."""
    folder = tmp_path_factory.mktemp("parquet")
    encoded = stored_shard(ParquetFormat(), arrays, topk=6, vocab_size=90).encoded
    file = folder / "shard.parquet"
    file.write_bytes(encoded.data)
    code = blocks("Parquet")
    assert len(code) == 4
    command = [sys.executable, "-c", RUN, str(file), json.dumps(code), ",".join(FOUND)]
    environment = os.environ | {"HF_HOME": str(folder), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["attributes"] == encoded.attributes
    return result


def rows(arrays: Arrays, name: str, edge: str) -> list[np.ndarray]:
    """A column cut into sequences."""
    return np.split(arrays[name], arrays[edge][1:-1].astype(int))


def test_pyarrow(arrays: Arrays, found: dict[str, Any]) -> None:
    token, flag = (rows(arrays, name, "sequence_start")[0] for name in ("token", "scored"))
    assert found["completion"] == token[arrays["prompt_length"][0] :].tolist()
    assert found["scored"] == token[flag == 1].tolist()
    used = arrays["topk_count"][0]
    entries = zip(arrays["topk_id"][0, :used], arrays["topk_logprob"][0, :used], strict=True)
    assert found["entries"] == {str(i): float(logprob) for i, logprob in entries}


def test_datasets(arrays: Arrays, found: dict[str, Any]) -> None:
    stopped = arrays["finish_reason"] == FINISH_REASONS.index("stop")
    assert 0 < stopped.sum() < 12
    assert found["stopped"] == arrays["rollout_id"][stopped].tolist()
    assert found["likeliest"] == rows(arrays, "topk_id", "position_start")[0][:, 0].tolist()


def test_polars(arrays: Arrays, found: dict[str, Any]) -> None:
    assert [row[0] for row in found["difference"]] == arrays["rollout_id"].tolist()
    assert np.allclose([row[1] for row in found["difference"]], -0.25, atol=1e-5)


def test_duckdb(arrays: Arrays, found: dict[str, Any]) -> None:
    positions = np.diff(arrays["position_start"].astype(int))
    expected = []
    for name in sorted(FINISH_REASONS):
        rows_of = arrays["finish_reason"] == FINISH_REASONS.index(name)
        if rows_of.any():
            expected.append([name, int(rows_of.sum()), int(positions[rows_of].sum())])
    assert found["positions"] == expected
    mass = np.exp(arrays["topk_logprob"].astype(float)).sum(axis=1)
    means = [m.mean() for m in np.split(mass, arrays["position_start"][1:-1].astype(int))]
    assert [row[0] for row in found["kept"]] == arrays["rollout_id"].tolist()
    assert np.allclose([row[1] for row in found["kept"]], means, rtol=1e-5)
