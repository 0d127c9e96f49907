"""Every call of the storage fails once, refused or after it took effect, while a rival works at
that moment: nothing committed is lost, nothing is live twice, and one more run does the rest."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.cache import commits as commits_module
from stillroom.cache import score as score_module
from stillroom.cache.claims import Claims
from stillroom.cache.collect import collect, plan_collection
from stillroom.cache.commits import read_commit
from stillroom.cache.errors import StillroomError
from stillroom.cache.schema import Arrays
from stillroom.cache.score import ScoreReport, score
from stillroom.cache.store import Cache
from stillroom.tools.repair import repair
from stillroom.tools.verify import verify
from tests.cache.crash_child import no_fsync
from tests.cache.fakes import FakeTeacher, make_identity, make_meta, random_rollouts, same_bits
from tests.integration.faulty_storage import FORMS, FaultyStorage

PARTS = 5
NAMES = [make_meta(number).name for number in range(PARTS)]
DONE, RETIRED, BROKEN = NAMES[0], NAMES[1], NAMES[4]
OLD_S = 3 * 24 * 3600


class NoClaims(Claims):
    """Every claim of others is taken for dead, so that scorers do meet at the same part."""

    def take(self, part: str) -> bool:
        super().take(part)
        return True


def score_all(root: Path) -> ScoreReport:
    return score(Cache.open(root), FakeTeacher())


def clean(root: Path) -> None:
    cache = Cache.open(root)
    collect(cache, plan_collection(cache))


def mend(cache: Cache) -> None:
    repair(cache, verify(cache, threads=1), deep=False)


def nothing(_: Path) -> None:
    pass


RIVALS: dict[str, Callable[[Path], object]] = {
    "nobody": nothing,
    "scorer": score_all,
    "gc": clean,
    "repair": lambda root: mend(Cache.open(root)),
}
JOBS: dict[str, Callable[[Cache], object]] = {
    "score": lambda cache: score(cache, FakeTeacher()),
    "gc": lambda cache: collect(cache, plan_collection(cache)),
    "repair": mend,
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_fsync)
    monkeypatch.setattr(commits_module, "BACKOFF_S", 0.0)
    monkeypatch.setattr(score_module, "Claims", NoClaims)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts scored, of which one was retired long ago and one is damaged; two to be scored,
    one of them with a dead attempt."""
    root = tmp_path_factory.mktemp("start")
    cache = Cache.create(root, make_identity())
    for number in (0, 1, 4):
        cache.add_part(random_rollouts(number, 3), make_meta(number))
    score_all(root)
    (shard,) = root.glob(f"scores/{BROKEN}/*/shard.zarr.zip")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    cache.retire(RETIRED, "old")
    for number in (2, 3):
        cache.add_part(random_rollouts(number, 3), make_meta(number))
    dead = f"scores/{NAMES[2]}/{'d' * 32}/manifest.json"
    cache.storage.put_new(dead, b"half")
    for name in (f"retired/{RETIRED}.json", dead):
        age(root / name)
    for path in (root / "scores" / RETIRED).rglob("*"):
        age(path)
    age(root / "rollouts" / f"{RETIRED}.parquet")
    return root


@pytest.fixture(scope="module")
def expected(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    """What each part's shard holds."""
    cache = Cache.create(tmp_path_factory.mktemp("expected"), make_identity())
    for number in range(PARTS):
        cache.add_part(random_rollouts(number, 3), make_meta(number))
    score(cache, FakeTeacher())
    return {part: cache.read(part) for part in NAMES}


def age(path: Path) -> None:
    then = path.stat().st_mtime - OLD_S
    os.utime(path, (then, then))


def check(root: Path, expected: dict[str, Arrays]) -> set[str]:
    """Everything committed is there and true; the parts that are live."""
    cache = Cache.open(root)
    quarantined = {path.name for path in root.glob("quarantine/*")}
    names = [path.name for path in root.glob("commits/*/*")]
    live = {name: name.rsplit(".", 2)[0] for name in names if name not in quarantined}
    assert len(live) == len(set(live.values())), "a part is live twice"
    assert DONE in live.values()
    for name, part in live.items():
        if name.startswith(RETIRED) or name == f"{BROKEN}.0.json":
            continue
        found = cache.read(part)
        assert all(same_bits(found[name], array) for name, array in expected[part].items())
    return set(live.values())


def fail_each_call(
    start: Path,
    expected: dict[str, Arrays],
    folder: Path,
    job: str,
    rival: str,
    step: int,
    run: int = 0,
) -> int:
    point = 0
    while True:
        point += step
        form = FORMS[(point // step + run) % 2]
        root = folder / f"{job}-{rival}-{run}-{point}"
        shutil.copytree(start, root)
        first = (root / f"commits/v000000/{DONE}.0.json").read_bytes()
        storage = FaultyStorage(str(root), point, form, lambda root=root: RIVALS[rival](root))  # type: ignore[misc]
        cache = Cache(storage, make_identity())
        try:
            JOBS[job](cache)
        except StillroomError:
            assert storage.failed
        if not storage.failed:
            return point // step
        live = check(root, expected)
        again = score_all(root)
        assert again.lost == []
        assert not set(again.scored) & live
        assert check(root, expected) == set(NAMES), storage.failed
        assert (root / f"commits/v000000/{DONE}.0.json").read_bytes() == first
        assert read_commit(Cache.open(root).storage, f"commits/v000000/{DONE}.0.json").part == DONE
        shutil.rmtree(root)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("job", JOBS)
def test_a_call_that_fails(
    start: Path, expected: dict[str, Arrays], tmp_path: Path, job: str, rival: str
) -> None:
    assert fail_each_call(start, expected, tmp_path, job, rival, step=9) > 1


@pytest.mark.slow
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("job", JOBS)
def test_every_call_that_fails(
    start: Path, expected: dict[str, Arrays], tmp_path: Path, job: str, rival: str
) -> None:
    for run in range(len(FORMS)):
        assert fail_each_call(start, expected, tmp_path, job, rival, step=1, run=run) > 15
