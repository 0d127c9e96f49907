"""Fixtures of the cache's tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from stillroom.cache.store import Cache
from tests.cache.crash_child import CHANGES, no_fsync
from tests.cache.fakes import make_identity

ROOT = Path(__file__).resolve().parents[2]
KillAt = Callable[[str, str, int, Path], str]
QUICK = settings(deadline=None, max_examples=25, derandomize=True, database=None)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache.create(tmp_path / "root", make_identity())


@pytest.fixture
def root(cache: Cache) -> Path:
    """Its folder."""
    return Path(cache.storage.root)


@pytest.fixture
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power, and this is ten times quicker."""
    monkeypatch.setattr(os, "fsync", no_fsync)


@pytest.fixture(scope="module")
def kill_at() -> Iterator[KillAt]:
    """Lets a child do a task until its change of the disk of some number; answers with the change,
    or "finished"."""
    command = [sys.executable, "-m", "tests.cache.crash_child"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines, answers = process.stdin, process.stdout

        def kill(task: str, mode: str, point: int, root: Path) -> str:
            lines.write(f"{task} {mode} {point} {root}\n")
            lines.flush()
            end = answers.readline().strip()
            assert end in (*CHANGES, "finished")
            return end

        yield kill
        lines.close()
        assert process.wait(timeout=30) == 0
