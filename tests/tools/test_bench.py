"""`stillroom bench store`: it measures what it says, on made-up scores and on a cache's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.check_arrays import check_arrays
from stillroom.tools.bench_data import join, made_up

SMALL = ("--no-peers", "--commits", "3")


def test_made_up_scores_are_a_shard(run: Any) -> None:
    sample = made_up(3000, 16)
    check_arrays(sample.arrays, 16, 0)
    ids = np.sort(sample.arrays["topk_id"], axis=1)
    assert sample.positions == 3000
    assert (ids[:, 1:] != ids[:, :-1]).all()
    mass = np.exp(sample.arrays["topk_logprob"].astype(float)).sum(1)
    mass += np.exp(sample.arrays["tail_logprob"].astype(float))
    assert np.abs(mass - 1).max() < 0.01


def test_joined_shards_are_one_shard() -> None:
    arrays = made_up(500, 4).arrays
    both = join([arrays, arrays])
    check_arrays(both, 4, 0)
    assert both["position_start"][-1] == 1000


def test_it_measures_made_up_scores(run: Any) -> None:
    ran = run("bench", "store", "--positions", "2000", "--topk", "8", *SMALL, "--json")
    assert ran.status == 0, ran.err
    value = ran.json()
    assert value["positions"] == 2000
    assert [row["store"] for row in value["stores"]] == ["Stillroom, zarr", "Stillroom, parquet"]
    for row in value["stores"]:
        assert row["bytes_per_position"] > sum(row["columns"].values())
        assert min(row["read_positions_s"], row["write_positions_s"], row["random_ms"]) > 0
    (opening,) = value["openings"]
    assert opening["commits"] == 3
    assert min(opening["open_mb"], opening["snapshot_mb"], opening["open_s"]) > 0


def test_it_measures_a_caches_own_scores(made_root: Path, run: Any) -> None:
    ran = run("bench", "store", made_root, "--no-peers", "--commits", "2")
    assert ran.status == 0, ran.err
    assert str(made_root) in ran.out.splitlines()[0]
    assert "Stillroom, parquet" in ran.out


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:.*rows\.tar")  # webdataset does not close what it has read
def test_other_stores_hold_the_same(tmp_path: Path) -> None:
    from stillroom.tools.bench_peers import peers, rows_of

    rows = rows_of(made_up(3000, 8).arrays)
    wanted = np.concatenate([row["topk_id"].reshape(-1) for row in rows])
    for peer in peers():
        folder = tmp_path / peer.package
        folder.mkdir()
        peer.write(rows, folder)
        read = [np.asarray(row["topk_id"]).reshape(-1) for row in peer.sequential(folder)]
        np.testing.assert_array_equal(np.concatenate(read), wanted, err_msg=peer.name)
        if peer.random is not None:
            one = np.asarray(peer.random(folder)(3)["token"]).reshape(-1)
            assert one.size > 0, peer.name


def test_wrong_figures_are_refused(run: Any) -> None:
    ran = run("bench", "store", "--positions", "0")
    assert ran.status == 2
    assert "positions" in ran.err
