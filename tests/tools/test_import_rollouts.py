"""`stillroom import`: files in, parts out, or nothing and a line that names file and row."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from stillroom.tools.import_rollouts import parse_columns
from tests.cache.fakes import VOCAB, make_identity

ROW = {"prompt": [1, 2], "completion": [3, 4]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty cache."""
    Cache.create(tmp_path / "cache", make_identity())
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows as JSON lines; returns the path."""

    def write_rows(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


def rows_of(root: Path) -> list[dict[str, Any]]:
    """All rows of all parts."""
    cache = Cache.open(root)
    return [row for part in cache.parts() for row in cache.read_part(part)[0].to_pylist()]


def test_files_become_parts_once(root: Path, write: Any, run: Any) -> None:
    a, b = write("a.jsonl", ROW, ROW), write("b.jsonl", ROW | {"scored": [0, 1]})
    ran = run("import", root, "--rollouts", a, b)
    assert ran.status == 0, ran.err
    assert ran.out.splitlines() == [
        f"import: {a}: 1 parts added; 2 rollouts, 4 positions to score",
        f"import: {b}: 1 parts added; 1 rollouts, 1 positions to score",
    ]
    ran = run("import", root, "--rollouts", b)
    assert "0 parts added, 1 were there; 0 rollouts" in ran.out
    assert len(rows_of(root)) == 3


def test_sampling_is_recorded(root: Path, write: Any, run: Any) -> None:
    path = write("a.jsonl", ROW)
    flags = ["--policy", 4, "--temperature", 0.7, "--top-k", 20, "--json"]
    report = run("import", root, "--rollouts", path, *flags).json()
    (part,) = report["files"][str(path)]["added"]
    _, meta, _ = Cache.open(root).read_part(part)
    assert meta.sampler == {"temperature": 0.7, "top_p": None, "top_k": 20}
    assert meta.policy_version == 4
    ran = run("import", root, "--rollouts", path)
    assert ran.status == 2
    assert "holds the same rollouts" in ran.err


def test_columns_and_layouts(root: Path, write: Any, run: Any) -> None:
    theirs = {"ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1], "text": "t", "x_reward": 0.5}
    columns = "token=ids, scored=loss_mask"
    path = write("a.jsonl", theirs)
    assert run("import", root, "--rollouts", path, "--columns", columns).status == 0
    record = {"prompt_ids": [1, 2], "response_ids": [3, 4], "metrics": {}}
    assert (
        run("import", root, "--rollouts", write("b.jsonl", record), "--layout", "verl").status == 0
    )
    found = rows_of(root)
    assert [(row["prompt"], row["completion"]) for row in found] == [([1, 2], [3, 4])] * 2
    assert sorted(row.get("x_reward", 0.0) for row in found) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"completion": [VOCAB]}, f"row 1: expected .* token id {VOCAB}"),
        (ROW | {"completion": "text"}, "row 1: expected .*not a list of token ids"),
        (ROW | {"behaviour_logprob": [0.0, 0.5]}, "row 1: .*a behaviour logprob above 0"),
        ([], "row 1: .*list, not a mapping"),
        (ROW | {"reward": 1.0}, r"got \['reward'\]"),
    ],
)
def test_one_bad_row_in_the_last_file_and_nothing_is_written(
    row: Any, message: str, root: Path, write: Any, run: Any, tree: Any
) -> None:
    before = tree(root)
    good, bad = write("good.jsonl", ROW), write("bad.jsonl", ROW, row)
    ran = run("import", root, "--rollouts", good, bad)
    assert (ran.status, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert re.search(f"^stillroom: error: {bad}.*{message}", line)
    assert tree(root) == before


def test_bad_rows_are_left_out_and_listed(root: Path, write: Any, run: Any, tmp_path: Path) -> None:
    a = write("a.jsonl", ROW, ROW | {"completion": []}, 5, ROW)
    b = write("b.jsonl", ROW | {"prompt": [9]})
    report = tmp_path / "left-out.jsonl"
    ran = run("import", root, "--rollouts", a, b, "--skip-bad", report)
    assert ran.status == 0
    assert ran.err == f"import: {a}: 2 of 4 rows left out, see {report}\n"
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {"file": str(a), "row": 1, "reason": "an empty completion"},
        {"file": str(a), "row": 2, "reason": "int, not a mapping"},
    ]
    assert len(rows_of(root)) == 3


def test_the_list_of_bad_rows_is_written_over_nothing(
    root: Path, write: Any, run: Any, tmp_path: Path, tree: Any
) -> None:
    before = tree(root)
    path = write("a.jsonl", ROW, 5)
    data = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for there in (path, link, root):
        ran = run("import", root, "--rollouts", path, "--skip-bad", there)
        assert ran.status == 2
        assert "skip_bad: expected a file that is not there yet" in ran.err
    ran = run("import", root, "--rollouts", path, "--skip-bad", tmp_path / "no/folder")
    assert (ran.status, "skip_bad: expected a file in a folder" in ran.err) == (2, True)
    ran = run("import", root, "--rollouts", path, "--skip-bad", tmp_path / ("x" * 300))
    assert (ran.status, "nothing was added" in ran.err) == (2, True)
    assert path.read_bytes() == data
    assert tree(root) == before
    assert not (tmp_path / "nowhere").exists()


def test_an_id_is_unique_over_files_and_imports(
    root: Path, write: Any, run: Any, tmp_path: Path
) -> None:
    first = write("a.jsonl", ROW | {"rollout_id": 1}, ROW | {"rollout_id": 2})
    second = write("b.jsonl", ROW | {"rollout_id": 3}, ROW | {"rollout_id": 2})
    ran = run("import", root, "--rollouts", first, second)
    assert (ran.status, Cache.open(root).parts()) == (2, [])
    assert f"{second}, row 1: " in ran.err
    assert run("import", root, "--rollouts", first).status == 0
    report = tmp_path / "left-out.jsonl"
    other = write("c.jsonl", ROW | {"rollout_id": 2, "prompt": [5]}, ROW | {"rollout_id": 4})
    ran = run("import", root, "--rollouts", second, other, "--skip-bad", report)
    assert ran.status == 0, ran.err
    assert f"{second}: 1 parts added, 1 were there; 1 rollouts" in ran.out
    (left,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert (left["file"], left["row"]) == (str(other), 0)
    assert sorted(row["rollout_id"] for row in rows_of(root)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "verl2"], "layout: expected one of verl, verl-batch"),
        (["--layout", "verl", "--columns", "prompt=p"], "columns or a layout"),
        (["--columns", "prompt"], "columns: expected OURS=THEIRS"),
        (["--columns", "prompt=a,prompt=b"], "columns: expected OURS=THEIRS"),
        (["--columns", "promt=prompt"], r"got \['promt'\]"),
        (["--columns", "prompt=ids,completion=completion"], r"no \['ids'\]"),
        (["--temperature", "0"], "temperature"),
        (["--policy", "-1"], "policy_version"),
        (["--positions-per-part", "0"], "positions_per_part"),
    ],
)
def test_usage_errors(
    flags: list[str], message: str, root: Path, write: Any, run: Any, tree: Any
) -> None:
    before = tree(root)
    ran = run("import", root, "--rollouts", write("a.jsonl", ROW), *flags)
    assert ran.status == 2
    assert re.search(message, ran.err)
    assert tree(root) == before


def test_a_file_is_named_once_and_there_is_one(root: Path, write: Any, run: Any) -> None:
    path = write("a.jsonl", ROW)
    assert "every file once" in run("import", root, "--rollouts", path, path).err
    assert run("import", root, "--rollouts").status == 2
    assert run("import", root).status == 2


def test_columns_are_parsed() -> None:
    assert parse_columns("a=b, c = d") == {"a": "b", "c": "d"}
    for text in ("", "a=", "=b", "a=b,", "a=b,a=c"):
        with pytest.raises(ConfigError):
            parse_columns(text)
