"""The looking commands on a cache whose entries are cut by mass and that holds draws from tails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.schema import UNUSED_ID, Arrays
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher, make_identity, make_meta, random_rollouts

CUT = {"mass": 0.7, "extra": 3, "extra_kind": "tail"}


@pytest.fixture
def arrays(tmp_path: Path) -> Arrays:
    """The shard of a part that the fake teacher scored, in a cache at the test's folder."""
    cache = Cache.create(tmp_path, make_identity(**CUT))
    assert cache.add_part(random_rollouts(1, 20), make_meta(1))
    (part,) = score(cache, FakeTeacher()).scored
    return cache.shard(cache.commit_of(part)).all_rows()


def test_stats_say_what_was_cut(tmp_path: Path, arrays: Arrays, run: Any) -> None:
    value = run("stats", tmp_path, "--json").json()
    count = arrays["topk_count"].astype(int)
    top, tail = (np.exp(arrays[name].astype(float)) for name in ("topk_logprob", "tail_logprob"))
    assert value["mass_cut"] == 0.7
    assert value["entries"]["mean"] == pytest.approx(count.mean())
    assert value["entries_left_out"] == (5 - count).sum() > 0
    assert value["mean_mass"]["5"] == pytest.approx(top.sum(1).mean())
    assert value["mean_tail_mass"] == pytest.approx(tail.mean())
    assert value["left_out_raw_bytes_per_position"] == pytest.approx(6 * (5 - count).mean())
    assert 0 < value["mean_hidden_kl_bound_nats"] < tail.mean() * np.log(40)
    out = run("stats", tmp_path).out
    assert "entries that cover 0.7, at most 5: mean " in out
    assert "entries left out: " in out
    assert "no worse there than a uniform guess: at most " in out


def test_show_gives_the_extra_ids(tmp_path: Path, arrays: Arrays, run: Any) -> None:
    value = run("show", tmp_path, "--position", 0, "--json").json()
    assert [extra["token_id"] for extra in value["extra"]] == arrays["extra_id"][0].tolist()
    logprob = arrays["extra_logprob"][0].tolist()
    assert [extra["logprob"] for extra in value["extra"]] == pytest.approx(logprob)
    given = arrays["extra_behaviour_logprob"][0].tolist()
    assert [extra["behaviour_logprob"] for extra in value["extra"]] == pytest.approx(given)
    out = run("show", tmp_path, "--position", 0).out
    (line,) = [line for line in out.splitlines() if line.startswith("extra ids")]
    assert f"{arrays['extra_id'][0, 0]} - {logprob[0]:.4f}, " in line
    assert "extra ids" not in run("show", tmp_path).out


def test_show_lists_no_more_than_is_kept(tmp_path: Path, arrays: Arrays, run: Any) -> None:
    ranked = run("show", tmp_path, "--position", 0, "--top", 5, "--json").json()["alternatives"]
    count = int(arrays["topk_count"][0])
    kept = [a["token_id"] for a in ranked if a["rank"] is not None]
    assert kept == arrays["topk_id"][0, :count].tolist()
    assert UNUSED_ID not in [a["token_id"] for a in ranked]


def test_a_cut_cache_verifies(tmp_path: Path, arrays: Arrays, run: Any) -> None:
    assert (arrays["topk_id"] == UNUSED_ID).any()
    ran = run("verify", tmp_path, "--json")
    assert (ran.status, ran.json()["findings"]) == (0, [])
