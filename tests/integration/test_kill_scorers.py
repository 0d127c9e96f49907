"""Scorers killed at random moments while others score, repair and collect rubbish: each part is
wholly there or not there, nothing committed is lost, and one more run does the rest. Some die
behind commits of theirs, and some within an attempt."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.schema import Arrays
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher, make_identity, make_meta, random_rollouts, same_bits

ROOT = Path(__file__).resolve().parents[2]
PARTS = 8
NAMES = [make_meta(number).name for number in range(PARTS)]
KILLS_A_ROOT = 8
EARLY_S, WITHIN_S = 0.08, 0.03
"""Longest waits before a kill: after a scorer's start, and after it began to write a shard."""
STUCK_S = 5.0
OLD_S = 3 * 24 * 3600


class Children:
    """Processes that are forked on demand and killed by their pids."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._started: set[int] = set()

    def start(self, task: str, root: Path) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{task} {root}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._started.add(pid)
        return pid

    def kill(self, pid: int) -> bool:
        """Whether it was still at work."""
        self._started.discard(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            return True
        return False

    def kill_all(self) -> None:
        """None outlives a test that fails."""
        for pid in tuple(self._started):
            self.kill(pid)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    command = [sys.executable, "-m", "tests.integration.race_child"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        made = Children(process)
        yield made
        made.kill_all()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of parts that are to be scored, with its canary."""
    root = tmp_path_factory.mktemp("start")
    cache = Cache.create(root, make_identity())
    cache.add_part(random_rollouts(0, 3), make_meta(0))
    score(cache, FakeTeacher())
    for number in range(1, PARTS):
        cache.add_part(random_rollouts(number, 3), make_meta(number))
    return root


@pytest.fixture(scope="module")
def expected(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """What each part's shard holds."""
    root = Path(shutil.copytree(start, tmp_path_factory.mktemp("expected") / "root"))
    cache = Cache.open(root)
    score(cache, FakeTeacher())
    return {part: cache.read(part) for part in NAMES}


def check(root: Path, expected: dict[str, Arrays], before: dict[str, bytes]) -> dict[str, bytes]:
    """Everything committed is whole and true; the commits."""
    cache = Cache.open(root)
    commits = {path.name: path.read_bytes() for path in root.glob("commits/*/v*.json")}
    assert commits.items() >= before.items(), "a commit is gone, or another"
    assert not list(root.glob("quarantine/*")), "nothing was damaged"
    assert sorted(cache.commits()) == sorted(name.rsplit(".", 2)[0] for name in commits)
    for part in cache.commits():
        found = cache.read(part)
        assert all(same_bits(found[name], array) for name, array in expected[part].items())
    return commits


def left_behind(root: Path) -> set[Path]:
    """Objects of attempts, and temporary files."""
    while True:
        with suppress(FileNotFoundError):  # gc removed a folder that was just listed
            return {*root.glob("scores/*/*/*"), *root.glob("commits/*/.*.tmp")}


def leave_more(root: Path, rng: random.Random) -> None:
    """What a scorer leaves that dies after its shard; few do by chance."""
    folder = root / "scores" / rng.choice(NAMES) / rng.randbytes(16).hex()
    with suppress(FileNotFoundError):  # gc removed the part's folder, which was empty
        folder.mkdir(parents=True)
        (folder / "shard.zarr.zip").write_bytes(b"a shard without a manifest")


def age(paths: set[Path]) -> None:
    """Three days pass for what dead scorers left; `gc` may take any of it at that moment."""
    then = time.time() - OLD_S
    for path in paths:
        with suppress(FileNotFoundError):
            os.utime(path, (then, then))


@dataclass(slots=True)
class Toll:
    """What happened."""

    kills: int = 0
    kills_behind_commits: int = 0
    """Of scorers that had committed something."""
    kills_within_attempts: int = 0
    """Rounds of kills that left an attempt at a part which then had no commit."""
    removed: int = 0
    """Objects that `gc` removed meanwhile."""


def scorer_pids(commits: dict[str, bytes]) -> set[int]:
    """Who made the commits."""
    return {json.loads(data)["scorer"]["pid"] for data in commits.values()}


def unfinished(objects: set[Path], commits: dict[str, bytes]) -> set[Path]:
    """Objects of attempts at parts that have no commit: only the dead leave them."""
    done = {name.rsplit(".", 2)[0] for name in commits}
    return {path for path in objects if path.match("scores/*/*/*") and path.parts[-3] not in done}


def wait(root: Path, rng: random.Random) -> None:
    """Until a random moment: of a scorer's first steps, or at its work, however slow it is."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, EARLY_S))
        return
    before, end = left_behind(root), time.monotonic() + STUCK_S
    while left_behind(root) <= before and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, WITHIN_S))


def race(
    children: Children, root: Path, expected: dict[str, Arrays], rng: random.Random, toll: Toll
) -> None:
    """Kill scorers, and now and then the others, until enough died."""
    others = {task: children.start(task, root) for task in ("clean", "mend")}
    commits: dict[str, bytes] = {}
    aged: set[Path] = set()
    kills = rounds = 0
    while kills < KILLS_A_ROOT and rounds < 4 * KILLS_A_ROOT and len(commits) < PARTS:
        rounds += 1
        scorers = [children.start("score", root) for _ in range(2)]
        wait(root, rng)
        dead = {pid for pid in rng.sample(scorers, 2) if children.kill(pid)}
        kills += len(dead)
        if rng.random() < 0.2:
            task = rng.choice(list(others))
            assert children.kill(others[task]), f"{task} ended by itself"
            others[task] = children.start(task, root)
            kills += 1
        commits = check(root, expected, commits)
        toll.kills_behind_commits += len(dead & scorer_pids(commits))
        toll.kills_within_attempts += bool(unfinished(left_behind(root) - aged, commits))
        leave_more(root, rng)
        aged |= left_behind(root)
        age(aged)
    cache = Cache.open(root)
    report = score(cache, FakeTeacher())
    assert sorted(report.scored) == sorted(set(NAMES) - {n.rsplit(".", 2)[0] for n in commits})
    for task, pid in others.items():
        assert children.kill(pid), f"{task} ended by itself"
    toll.kills += kills
    toll.removed += sum(not path.exists() for path in aged)
    age(left_behind(root))
    collect(cache, plan_collection(cache))
    check(root, expected, commits)
    assert sorted(cache.commits()) == NAMES
    assert len(left_behind(root)) == 2 * PARTS, "shard and manifest of each part, and nothing else"


def kill_many(
    children: Children, start: Path, expected: dict[str, Arrays], folder: Path, kills: int
) -> None:
    rng, toll, roots = random.Random(kills), Toll(), 0
    while toll.kills < kills:
        root = Path(shutil.copytree(start, folder / str(roots)))
        race(children, root, expected, rng, toll)
        shutil.rmtree(root)
        roots += 1
        assert roots < kills
    assert toll.removed > 0, f"gc met no scorers: {toll}"
    assert toll.kills_behind_commits >= kills // 50, f"killed before they committed: {toll}"
    assert toll.kills_within_attempts >= kills // 50, f"killed while they wrote nothing: {toll}"


@pytest.mark.dist
def test_hundreds_of_kills(
    children: Children, start: Path, expected: dict[str, Arrays], tmp_path: Path
) -> None:
    kill_many(children, start, expected, tmp_path, 200)


@pytest.mark.dist
@pytest.mark.slow
def test_thousands_of_kills(
    children: Children, start: Path, expected: dict[str, Arrays], tmp_path: Path
) -> None:
    kill_many(children, start, expected, tmp_path, 2000)
