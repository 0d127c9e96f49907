"""The code about Zarr in docs/reading-shards.md reads a shard that Stillroom wrote, without
Stillroom."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.example_shards import random_shard
from stillroom.cache.store import Cache
from tests.cache.fakes import commit_shard, make_identity, same_bits

DOCUMENT = Path(__file__).parents[1] / "docs" / "reading-shards.md"
TOPK, VOCAB = 6, 900
SETTINGS = {"topk": TOPK, "vocab_size": VOCAB, "logit_width": VOCAB}


def code(heading: str) -> str:
    """All Python of a section."""
    text = DOCUMENT.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks, f"no code under {heading!r}"
    assert "stillroom" not in "".join(blocks)
    return "\n".join(blocks)


@pytest.mark.parametrize("mass", [True, False])
def test_zarr(mass: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = random_shard(
        0, 2500, 20, topk=TOPK, vocab_size=VOCAB, extra=2, mass=mass, user_columns=True
    )
    identity = make_identity(extra=2, extra_kind="student", **SETTINGS)
    commit_shard(Cache.create(tmp_path / "cache", identity), arrays)
    found: dict[str, Any] = {}
    exec(code("Which file") + code("Zarr"), found)
    assert found["groups"] > 1
    assert same_bits(found["topk_id"], arrays["topk_id"])
    assert same_bits(found["logprob"], arrays["topk_logprob"])
    assert same_bits(found["tail"], arrays["tail_logprob"])
    assert same_bits(found["sampled"], arrays["sampled_logprob"])
    first, last = arrays["position_start"][1:3].tolist()
    assert same_bits(found["behaviour"], arrays["behaviour_logprob"][first:last])
    start, stop = arrays["sequence_start"][1:3].tolist()
    scored = arrays["scored"][start:stop].astype(bool)
    assert same_bits(found["completion"], arrays["token"][start:stop][scored])
    stored = {name for name, _ in found["shard"].arrays()}
    assert arrays.keys() - stored == {"topk_id"}
    for name in arrays.keys() & stored - {"topk_logprob"}:
        assert same_bits(np.asarray(found["shard"][name][:]), arrays[name])
