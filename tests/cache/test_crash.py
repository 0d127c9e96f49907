"""A job killed at any change of the disk: readers see whole objects, a rerun does the rest."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillroom.cache.schema import Arrays
from stillroom.cache.store import Cache
from tests.cache.conftest import KillAt
from tests.cache.crash_child import CHANGES, MODES, PARTS, plan, score_all
from tests.cache.fakes import make_meta, random_rollouts, same_bits

pytestmark = pytest.mark.usefixtures("_no_fsync")
NAMES = [make_meta(number).name for number in range(PARTS)]
# To die after a change is mostly to die before the next one.
QUICK_AND_SLOW = [pytest.param(m, marks=pytest.mark.slow) if m == "after" else m for m in MODES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that nobody killed, all parts scored."""
    root = tmp_path_factory.mktemp("whole")
    plan(str(root))
    assert sorted(score_all(str(root)).scored) == NAMES
    return root


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Arrays]:
    """Its shards."""
    cache = Cache.open(whole)
    return {part: cache.shard(cache.commit_of(part)).all_rows() for part in NAMES}


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Path]:
    """New roots."""
    return (tmp_path / str(i) for i in range(1000))


def files_of(root: Path) -> dict[Path, bytes]:
    """All files but temporary ones, and claims, which nothing depends on."""
    found = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "claims")
    return {path: path.read_bytes() for path in found if not path.name.startswith(".")}


def attempts_of(root: Path) -> int:
    """Attempts, committed or not."""
    return len(list(root.glob("scores/*/*")))


def check(root: Path, expected: dict[str, Arrays]) -> list[str]:
    """All that can be read is whole and true; the parts that have a shard."""
    if not (root / "cache.json").exists():
        return []
    cache = Cache.open(root)
    for part in cache.parts():
        table, meta, _ = cache.read_part(part)
        assert table.equals(random_rollouts(NAMES.index(part), 3).cast(table.schema))
        assert meta.name == part
    live = sorted(cache.commits())
    assert len(cache.storage.list("commits")) == len(live), "a part has one commit"
    snapshot = cache.snapshot()
    assert [commit.part for commit in snapshot.commits] == live
    for commit in snapshot.commits:
        found = cache.shard(commit).all_rows()
        assert found.keys() == expected[commit.part].keys()
        assert all(same_bits(found[name], a) for name, a in expected[commit.part].items())
    return live


@pytest.mark.dist
@pytest.mark.parametrize("mode", QUICK_AND_SLOW)
def test_killed_while_the_cache_and_its_parts_are_made(
    kill_at: KillAt, roots: Iterator[Path], mode: str
) -> None:
    ends: list[str] = []
    while "finished" not in ends:
        root = next(roots)
        ends.append(kill_at("plan", mode, len(ends) + 1, root))
        assert check(root, {}) == []
        before = files_of(root)
        cache = plan(str(root))
        assert cache.parts() == cache.unscored() == NAMES
        check(root, {})
        after = files_of(root)
        assert all(after[path] == data for path, data in before.items())
    assert len(ends) > 25
    assert set(ends) == {*CHANGES, "finished"} - {"replace", "rmdir"}


@pytest.mark.dist
@pytest.mark.parametrize("mode", QUICK_AND_SLOW)
@pytest.mark.parametrize("scored", [0, 1])
def test_killed_while_scoring(
    kill_at: KillAt,
    whole: Path,
    expected: dict[str, Arrays],
    roots: Iterator[Path],
    mode: str,
    scored: int,
) -> None:
    """No part is scored when the job starts, or all but the last."""
    start, ends = next(roots), list[str]()
    shutil.copytree(whole, start)
    for part in NAMES[scored:]:
        shutil.rmtree(start / "scores" / part)
        (start / f"commits/v000000/{part}.0.json").unlink()
    if not scored:
        shutil.rmtree(start / "commits")
        shutil.rmtree(start / "scores")
    while "finished" not in ends:
        root = Path(shutil.copytree(start, next(roots)))
        ends.append(kill_at("score", mode, len(ends) + 1, root))
        done = check(root, expected)
        before, attempts = files_of(root), attempts_of(root)
        assert attempts <= len(done) + 1, "one part was in flight"
        report = score_all(str(root))
        assert sorted(report.scored) == [part for part in NAMES if part not in done]
        assert report.lost == []
        assert attempts_of(root) == attempts + len(report.scored)
        assert check(root, expected) == NAMES
        after = files_of(root)
        assert all(after[path] == data for path, data in before.items())
        if done and not scored:
            break  # the last part is the other case
    assert set(ends) >= {"mkdir", "fsync", "link", "replace", "unlink"}
