"""`status` and `ls`: states, counts and bytes, without reading a shard."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.shard import Shard
from stillroom.tools.listing import describe_kept
from tests.cache.fakes import make_identity


def test_ls_knows_every_state(made_root: Path, run: Any) -> None:
    lines = {line["part"][-1]: line for line in run("ls", made_root, "--json").json()}
    states = {part: line["state"] for part, line in lines.items()}
    assert states == {"1": "scored", "2": "retired", "3": "quarantined", "4": "unscored"}
    assert [lines[part]["rows"] for part in "1234"] == [4, 4, 4, 4]
    scored = lines["1"]
    assert scored["bytes_per_position"] == pytest.approx(
        scored["stored_bytes"] / scored["positions"]
    )
    assert (scored["scorer_host"], scored["teacher_s"]) == ("made-up", 2.0)
    assert lines["4"]["positions"] is None
    assert lines["4"]["rollouts_bytes"] > 0


def test_removed_shards_have_no_bytes(damaged: Path, run: Any) -> None:
    then = time.time() - 2 * 86_400
    for path in damaged.rglob("*"):
        os.utime(path, (then, then))
    retired = run("ls", damaged, "--json").json()[1]
    assert (retired["state"], retired["stored_bytes"] > 0) == ("retired", True)
    assert run("gc", damaged).status == 0
    lines = run("ls", damaged, "--json").json()
    assert [line["state"] for line in lines] == ["scored", "removed", "quarantined", "unscored"]
    assert lines[1] == retired | {"state": "removed", "stored_bytes": 0, "rollouts_bytes": None}
    (policy,) = run("status", damaged, "--json").json()["policies"]
    assert (policy["retired"], policy["removed"]) == (0, 1)
    assert policy["stored_bytes"] == lines[0]["stored_bytes"]
    assert policy["teacher_s"] == 4.0, "the teacher was paid all the same"


def test_ls_prints_one_line_a_part(made_root: Path, run: Any) -> None:
    ran = run("ls", made_root)
    head, *lines = ran.out.splitlines()
    assert ran.status == 0
    assert head.split()[:3] == ["part", "policy", "state"]
    assert [line.split()[2] for line in lines] == ["scored", "retired", "quarantined", "unscored"]
    assert "\x1b" not in ran.out


def test_status_sums_over_policies(made_root: Path, run: Any) -> None:
    value = run("status", made_root, "--json").json()
    assert value["identity"]["topk"] == 8
    (policy,) = value["policies"]
    assert [policy[state] for state in ("unscored", "scored", "retired", "quarantined")] == [1] * 4
    assert (policy["parts"], policy["rows"], policy["run"]) == (4, 16, "made-up")
    assert policy["teacher_s"] == 4.0


def test_status_names_the_teacher_and_units(made_root: Path, teacher_dir: Path, run: Any) -> None:
    out = run("status", made_root).out
    assert f"teacher {teacher_dir}" in out
    assert "top 8 of 262 tokens, temperature 1.0" in out
    assert "the teacher took 4.0 s for" in out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "top 5 of 40 tokens"),
        ({"mass": 0.9}, "top 5 of 40 tokens that cover 0.9"),
        ({"extra": 3, "extra_kind": "student"}, "top 5 of 40 tokens and 3 ids of the student"),
        ({"extra": 3, "extra_kind": "tail"}, "top 5 of 40 tokens and 3 ids drawn from the tail"),
    ],
)
def test_what_is_kept_is_said(settings: dict[str, Any], said: str) -> None:
    assert describe_kept(make_identity(**settings)) == said


def test_neither_opens_a_shard(
    made_root: Path, run: Any, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Shard, "__init__")
    before = tree(made_root)
    for command in ("ls", "status"):
        assert run(command, made_root).status == 0
    assert tree(made_root) == before


def test_damaged_parquet_footer_gives_no_count(damaged: Path, run: Any) -> None:
    path = sorted((damaged / "rollouts").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:-6])
    assert run("ls", damaged, "--json").json()[-1]["rows"] is None


@pytest.mark.parametrize("command", ["status", "ls", "show", "stats"])
def test_damaged_commit_is_an_error(command: str, damaged: Path, run: Any) -> None:
    (path,) = damaged.glob("commits/*/*0001.0.json")
    path.write_bytes(b"{}")
    ran = run(command, damaged)
    assert ran.status == 2
    assert str(path) in ran.err
