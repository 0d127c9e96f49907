"""The command line: help, exit statuses, and what an import costs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.tools import cli
from stillroom.tools.cli import COMMANDS

JOBS = [name for name, command in COMMANDS.items() if command.takes_file]
WITHOUT_JSON = [name for name in JOBS if name != "estimate"]


def test_overview_lists_every_command(run: Any) -> None:
    ran = run("--help")
    assert ran.status == 0
    for name, command in COMMANDS.items():
        assert f"  {name:<8} {command.summary}\n" in ran.out
    assert run().status == 2


def test_version(run: Any) -> None:
    assert run("--version").out.startswith("stillroom 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_flag(name: str, run: Any) -> None:
    ran = run(name, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"usage: stillroom {name}")
    assert ("FILE.yaml" in ran.out) == (name in JOBS)
    assert ("--json" in ran.out) == (name not in WITHOUT_JSON)


def test_help_gives_units(run: Any) -> None:
    text = " ".join(run("run", "--help").out.replace("│", " ").split())
    assert "Longest completion, in tokens; >= 1." in text
    assert "Decoded blocks kept in memory, bytes." in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["scroe"], "Did you mean 'score'"),
        (["export"], "expected one of init"),
        (["ls"], "root"),
        (["ls", "r", "--jsn"], "--json"),
        (["show", "r", "--row", "x"], "row"),
        (["train", "--root", "r"], "--output"),
        (["ls", "nowhere"], "no cache.json"),
    ],
)
def test_usage_errors(args: list[str], message: str, run: Any) -> None:
    ran = run(*args)
    assert ran.status == 2
    assert ran.out == ""
    assert message.lower() in ran.err.lower()
    assert "Traceback" not in ran.err


def test_errors_are_one_safe_line(run: Any) -> None:
    ran = run("ls", "no\n\x1b[31mwhere")
    assert ran.err.startswith("stillroom: error: ")
    assert ran.err.count("\n") == 1
    assert "\x1b" not in ran.err


def test_interrupt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(root: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stillroom.tools.looks.Cache.open", interrupt)
    assert run("ls", "r").status == 130


def test_system_errors_are_reported(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: str) -> None:
        raise PermissionError(13, "Permission denied", root)

    monkeypatch.setattr("stillroom.tools.looks.Cache.open", fail)
    ran = run("ls", "r")
    assert (ran.status, ran.err) == (2, "stillroom: error: [Errno 13] Permission denied: 'r'\n")


def test_our_own_bugs_are_not_hidden(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: str) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("stillroom.tools.looks.Cache.open", fail)
    with pytest.raises(AssertionError):
        run("ls", "r")


@pytest.mark.dist
def test_broken_pipe_is_quiet(made_root: Path) -> None:
    run = f"main(['show', {str(made_root)!r}])"
    code = f"import sys; from stillroom.tools.cli import main; sys.exit({run})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == cli.BROKEN_PIPE


@pytest.mark.dist
def test_looking_and_help_import_no_model_library(made_root: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from stillroom.tools.cli import COMMANDS, main
for command in ("status", "ls", "show", "stats", "verify"):
    assert main([command, {str(made_root)!r}]) == 0, command
for command in COMMANDS:
    assert main([command, "--help"]) == 0, command
heavy = {{"torch", "transformers", "datasets", "zarr", "accelerate", "tensorboard"}}
print("imported", sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported []\n")
