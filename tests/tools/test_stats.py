"""`stats` against the same figures computed from all rows at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.store import Cache
from stillroom.tools import stats


@pytest.fixture
def value(made_root: Path, run: Any) -> Any:
    """What it prints as JSON."""
    return run("stats", made_root, "--json").json()


def test_teacher_figures(value: Any, made_root: Path, live_part: str) -> None:
    cache = Cache.open(made_root)
    arrays = cache.shard(cache.commit_of(live_part)).all_rows()
    mass = np.exp(arrays["topk_logprob"].astype(float))
    assert value["positions"] == len(mass)
    expected = {"1": mass[:, 0].mean(), "8": mass.sum(1).mean()}
    assert value["mean_mass"] == pytest.approx(expected, rel=1e-6)
    assert value["mean_tail_mass"] == pytest.approx(
        np.exp(arrays["tail_logprob"].astype(float)).mean()
    )
    sampled = arrays["token"][arrays["scored"] == 1]
    outside = (arrays["topk_id"] != sampled[:, None]).all(1).mean()
    assert value["sampled_outside_topk"] == pytest.approx(outside)


def test_bytes_add_up(value: Any, made_root: Path, live_part: str) -> None:
    cache = Cache.open(made_root)
    commit = cache.commit_of(live_part)
    sizes = value["bytes"]
    assert sizes["shard_objects"] + sizes["manifests"] == commit.stored_bytes
    assert sizes["rollouts"] == (made_root / "rollouts" / f"{live_part}.parquet").stat().st_size
    assert value["bytes_per_position"] == pytest.approx(commit.stored_bytes / commit.positions)
    shard = cache.shard(commit)
    raw = sum(array.nbytes for array in shard.read_ranges((n, 0, None) for n in shard.columns))
    assert value["raw_bytes_per_position"] == pytest.approx(raw / commit.positions)
    assert value["compression"] == pytest.approx(raw / commit.stored_bytes)
    stored = value["stored_bytes_per_position"]
    assert stored.keys() == shard.manifest.arrays.keys()
    chunks = shard.manifest.arrays["topk_logprob"].chunks
    own = sum(chunk.length for chunk in chunks) / commit.positions
    assert stored["topk_logprob"] == pytest.approx(own)
    assert sum(stored.values()) < value["bytes_per_position"]


def test_rollout_figures(value: Any) -> None:
    assert value["policy_versions"] == {"0": 4}
    assert value["finish_reasons"] == {"length": 2, "stop": 2}
    assert value["sources"] == {"student": 4}
    assert (value["shards"], value["retired_parts"], value["unscored_parts"]) == (1, 1, 2)
    assert value["lengths"]["prompt"] == {"mean": 5, "p50": 5, "p95": 5, "max": 5}
    assert value["lengths"]["completion"]["max"] > value["lengths"]["completion"]["mean"]


def test_blocks_do_not_change_figures(
    value: Any, made_root: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "BLOCK_ROWS", 7)
    again = run("stats", made_root, "--json").json()
    assert again["mean_mass"] == pytest.approx(value["mean_mass"])
    assert again["sampled_outside_topk"] == value["sampled_outside_topk"]


def test_prints_units(made_root: Path, run: Any, tree: Any) -> None:
    before = tree(made_root)
    ran = run("stats", made_root)
    assert ran.status == 0
    for text in (
        "bytes/position",
        "mean probability of the teacher's top 8",
        "length, tokens",
        "took 2.0 s",
    ):
        assert text in ran.out
    assert tree(made_root) == before


def test_empty_cache(damaged: Path, run: Any) -> None:
    for path in damaged.glob("commits/*/*"):
        path.unlink()
    value = run("stats", damaged, "--json").json()
    assert (value["positions"], value["bytes_per_position"], value["compression"]) == (
        0,
        None,
        None,
    )
    assert run("stats", damaged).status == 0


def test_damage_is_an_error(damaged: Path, run: Any) -> None:
    for path in damaged.glob("scores/*/*/shard.zarr.zip"):
        path.write_bytes(path.read_bytes()[:2000])
    ran = run("stats", damaged)
    assert ran.status == 2
    assert "shard.zarr.zip" in ran.err
