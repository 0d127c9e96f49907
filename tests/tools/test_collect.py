"""`stillroom gc`: what it prints, and that a dry run changes nothing."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.pins import pin
from stillroom.cache.store import Cache
from tests.tools.conftest import RETIRED, UNSCORED


@pytest.fixture
def aged(damaged: Path) -> Path:
    """A root where everything is two days old."""
    then = time.time() - 2 * 86_400
    for path in damaged.rglob("*"):
        os.utime(path, (then, then))
    return damaged


def test_a_young_cache_has_no_rubbish(damaged: Path, run: Any, tree: Any) -> None:
    before = tree(damaged)
    ran = run("gc", damaged)
    assert (ran.status, ran.out) == (0, f"gc: removed 0 objects, 0 bytes of {damaged}\n")
    assert tree(damaged) == before


def test_a_dry_run_says_what_a_run_removes(aged: Path, run: Any, tree: Any) -> None:
    before = tree(aged)
    dry = run("gc", aged, "--dry-run")
    assert dry.status == 0
    assert tree(aged) == before
    *lines, last = dry.out.splitlines()
    assert [line.split()[0] for line in lines] == ["shard", "attempt", "rollouts", "probe"]
    assert f"rollouts/{RETIRED}.parquet" in dry.out
    assert "its part was retired 48 h ago" in dry.out
    assert f"scores/{UNSCORED}/{'e' * 32}" in dry.out
    assert last.startswith("gc: nothing was removed (--dry-run): 5 objects, ")
    wet = run("gc", aged)
    *same, end = wet.out.splitlines()
    assert same == lines
    assert end.startswith("gc: removed 5 objects, ")
    gone = {path for path, data in before.items() if data} - tree(aged).keys()
    assert {path.split("/")[0] for path in gone} == {"probe", "rollouts", "scores"}
    assert len(gone) == 5
    assert run("gc", aged).out == f"gc: removed 0 objects, 0 bytes of {aged}\n"


def test_json_holds_plan_and_result(aged: Path, run: Any) -> None:
    storage = Cache.open(aged).storage
    snapshot = storage.list("snapshots")[0].path.split("/")[1].removesuffix(".parquet")
    pin(storage, "run", [snapshot])
    dry = run("gc", aged, "--dry-run", "--json").json()
    assert dry["removed"] is None
    assert [item["kind"] for item in dry["planned"]["rubbish"]] == ["attempt", "probe"]
    assert {one["why"] for one in dry["planned"]["kept"]} == {"pinned by run run"}
    wet = run("gc", aged, "--json").json()
    assert wet["planned"] == dry["planned"]
    assert wet["removed"]["rubbish"] == dry["planned"]["rubbish"]
    assert wet["removed"]["objects"] == wet["planned"]["objects"] == 2
    assert wet["removed"]["size_bytes"] == wet["planned"]["size_bytes"] > 0


def test_other_commands_take_a_collected_cache(aged: Path, run: Any) -> None:
    assert run("gc", aged).status == 0
    for command in ("status", "ls", "stats", "show", "verify"):
        ran = run(command, aged)
        assert (ran.status, ran.err) == (0, ""), command


def test_a_pin_that_cannot_be_read_is_an_error(aged: Path, run: Any, tree: Any) -> None:
    Cache.open(aged).storage.put("pins/run.json", b"{}")
    before = tree(aged)
    ran = run("gc", aged)
    assert ran.status == 2
    assert "pins/run.json" in ran.err
    assert tree(aged) == before
