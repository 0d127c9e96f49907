"""`stillroom doctor`: what works is ok, what does not is said with what to do; nothing stays."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.claims import Claims, claim_path
from stillroom.cache.part import part_name
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.tools import doctor_local, doctor_storage
from tests.cache.s3 import S3

Usage = namedtuple("Usage", "total used free")
SMALL = ("--size-mb", "1")


@pytest.fixture(autouse=True)
def _some_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room, whatever the tests run on."""
    monkeypatch.setattr(doctor_local, "file_system", lambda folder: "ext4")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))
    monkeypatch.setattr(doctor_storage, "SLOW_MB_S", 0.0)


@pytest.fixture
def level(run: Any) -> Callable[..., dict[str, str]]:
    """Runs it; gives the level of everything that was tried, and checks the exit status."""

    def look(root: object) -> dict[str, str]:
        ran = run("doctor", root, *SMALL, "--json")
        levels = {f["what"]: f["level"] for f in ran.json()["findings"]}
        assert ran.status == (0 if set(levels.values()) == {"ok"} else 1), ran.err
        assert all(f["do"] for f in ran.json()["findings"] if f["level"] != "ok")
        return levels

    return look


def test_a_folder_that_is_not_there_is_as_before(tmp_path: Path, level: Any) -> None:
    levels = level(tmp_path / "a" / "b")
    assert levels["put if absent"] == levels["identity"] == levels["deleting, for gc"] == "ok"
    assert set(levels.values()) == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_as_before(made_root: Path, level: Any, tree: Any, run: Any) -> None:
    before = tree(made_root)
    assert level(made_root)["claims"] == "ok"
    assert tree(made_root) == before
    ran = run("doctor", made_root, *SMALL)
    assert "0 parts are being scored, of 2 that are to be" in ran.out
    assert "top 8 of 262 tokens" in ran.out


def test_speeds_are_told(tmp_path: Path, run: Any) -> None:
    figures = run("doctor", tmp_path, *SMALL, "--json").json()["figures"]
    assert min(figures[name] for name in ("put_ms", "get_ms", "list_ms", "write_mb_s")) > 0
    assert abs(figures["clock_offset_s"]) < 60


def test_an_object_store(s3: S3, level: Any) -> None:
    root = s3.new_root()
    levels = level(root)
    assert set(levels.values()) == {"ok"}
    assert Storage(root).list_all() == []


def test_a_store_that_ignores_conditions_is_bad(s3: S3, level: Any) -> None:
    s3.proxy.ignores_conditions = True
    root = s3.new_root()
    levels = level(root)
    assert levels["put if absent"] == "bad"
    assert "speed" not in levels
    assert Storage(root).list_all() == []


def test_a_store_that_may_not_be_written_is_bad(s3: S3, level: Any) -> None:
    s3.proxy.misbehave("deny", "PUT", times=1000)
    levels = level(s3.new_root())
    assert levels["put if absent"] == "bad"
    assert levels["identity"] == "ok"


def test_a_store_that_deletes_nothing_says_what_stays(s3: S3, level: Any) -> None:
    s3.proxy.misbehave("deny", "DELETE", times=1000)
    s3.proxy.misbehave("deny", "POST", times=1000)
    root = s3.new_root()
    levels = level(root)
    assert levels["deleting, for gc"] == "warning"
    assert levels["put if absent"] == "ok"
    s3.proxy.behave()
    assert all(entry.path.startswith("probe/") for entry in Storage(root).list_all())


def test_one_refused_delete_is_one_object(s3: S3, run: Any) -> None:
    s3.proxy.misbehave("deny", "DELETE", times=1)
    s3.proxy.misbehave("deny", "POST", times=1)
    root = s3.new_root()
    out = run("doctor", root, *SMALL, "--json").json()
    (said,) = (f["got"] for f in out["findings"] if f["what"] == "deleting, for gc")
    s3.proxy.behave()
    left = len(Storage(root).list_all())
    assert left in (1, 2)
    assert said.startswith(f"{left} objects below probe/ stay")


@pytest.mark.dist
def test_nothing_stays_where_it_is_told_to_end(tmp_path: Path) -> None:
    root = tmp_path / "a" / "cache"
    command = [str(Path(sys.executable).parent / "stillroom"), "doctor", str(root)]
    with subprocess.Popen([*command, "--size-mb", "1024"], stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while len([*root.glob("probe/*")]) < 8 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"stillroom: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_root_is_bad(tmp_path: Path, level: Any) -> None:
    (tmp_path / "file").write_text("x")
    assert level(tmp_path / "file" / "cache")["put if absent"] == "bad"


def test_no_hard_links(tmp_path: Path, level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert level(tmp_path / "root")["put if absent"] == "bad"
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_below_the_root_is_named(damaged: Path, run: Any) -> None:
    target = damaged / "rollouts"
    target.rename(damaged.parent / "elsewhere")
    target.symlink_to(damaged.parent / "elsewhere")
    ran = run("doctor", damaged, *SMALL)
    assert ran.status == 1
    assert str(target) in ran.out


@pytest.mark.parametrize(
    ("kind", "expected"), [("tmpfs", "warning"), ("fuse.gcsfuse", "warning"), ("xfs", "ok")]
)
def test_file_systems(
    kind: str, expected: str, tmp_path: Path, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_local, "file_system", lambda folder: kind)
    assert level(tmp_path)["file system"] == expected


def test_the_file_system_is_that_of_the_nearest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda rw", f"2 1 0:2 / {tmp_path} rw - tmpfs none rw"]
    mounts.write_text("\n".join(lines))
    monkeypatch.undo()
    monkeypatch.setattr(doctor_local, "MOUNTS", mounts)
    assert doctor_local.file_system(tmp_path) == "tmpfs"
    assert doctor_local.file_system(Path("/")) == "ext4"
    monkeypatch.setattr(doctor_local, "MOUNTS", tmp_path / "nothing")
    assert doctor_local.file_system(tmp_path) == ""


@pytest.mark.parametrize(("free", "expected"), [(10**9, "warning"), (10**6, "bad")])
def test_little_room(
    free: int, expected: str, tmp_path: Path, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, free))
    assert level(tmp_path)["free space"] == expected


def test_a_clock_that_is_off(tmp_path: Path, level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_storage, "SKEW_S", -1.0)
    assert level(tmp_path)["clock"] == "warning"


def test_a_slow_storage(tmp_path: Path, level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_storage, "SLOW_MS", 0.0)
    monkeypatch.setattr(doctor_storage, "SLOW_MB_S", 1e12)
    levels = level(tmp_path)
    assert levels["time of a put"] == levels["speed"] == "warning"


def test_a_damaged_identity_is_bad(damaged: Path, level: Any) -> None:
    path = damaged / "cache.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert level(damaged)["identity"] == "bad"


TAKE = (
    "import sys; from stillroom.cache.claims import Claims; from stillroom.cache.storage import "
    "Storage; assert all(map(Claims(Storage(sys.argv[1])).take, sys.argv[2:]))"
)


def test_claims_of_a_worker_that_ended_are_found(damaged: Path, level: Any, run: Any) -> None:
    cache = Cache.open(damaged)
    first, second = cache.unscored()
    assert Claims(cache.storage).take(first)
    assert level(damaged)["claims"] == "ok"
    subprocess.run([sys.executable, "-c", TAKE, str(damaged), second], check=True)
    ran = run("doctor", damaged, *SMALL)
    assert ran.status == 1
    claim = jsonfile.load_sealed(cache.storage.get(claim_path(second)), "claim")
    assert f"1 left by dead workers, such as {second} by {claim['host']} {claim['pid']}" in ran.out
    assert "1 parts are being scored" in ran.out


def test_claims_of_rollouts_are_found(damaged: Path, level: Any, run: Any) -> None:
    """Their parts are not there yet; claims of parts that are scored or retired count no more."""
    cache, planned = Cache.open(damaged), part_name(1, "ab" * 8)
    claimed = [planned, *cache.commits(), *cache.retired()]
    subprocess.run([sys.executable, "-c", TAKE, str(damaged), *claimed], check=True)
    ran = run("doctor", damaged, *SMALL)
    assert (
        f"0 parts are being scored, of 2 that are to be; 1 left by dead workers, such as {planned}"
        in (" ".join(ran.out.split()))
    )
    assert f"The next 'stillroom rollout' takes over {planned}" in ran.out
    assert Claims(cache.storage).take(planned)
    assert level(damaged)["claims"] == "ok"
    assert "; 1 are being sampled" in run("doctor", damaged, *SMALL).out


def test_sizes_out_of_range_are_refused(tmp_path: Path, run: Any) -> None:
    assert run("doctor", tmp_path, "--size-mb", "0").status == 2
    assert run("doctor", "s3://user:secret@bucket/prefix").status == 2
