"""Claims: one worker a part while it lives, and none that blocks for longer than it must."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import claims, jsonfile
from stillroom.cache.claims import DEAD_AFTER_S, Claim, Claims, claim_path, may_run
from stillroom.cache.errors import StorageError
from stillroom.cache.storage import Storage
from tests.cache.fakes import make_meta

PART = make_meta(1).name
PARTS = [make_meta(number).name for number in range(200)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty one."""
    return Storage(tmp_path)


def read(storage: Storage) -> Claim:
    """The claim of the part."""
    path = claim_path(PART)
    claim: Claim = jsonfile.build(Claim, jsonfile.load_sealed(storage.get(path), path), path)
    return claim


def change(storage: Storage, *, age_s: float = 0.0, **fields: Any) -> None:
    """Change the claim of the part, and how long ago it was renewed."""
    storage.put(claim_path(PART), jsonfile.dump_sealed(asdict(replace(read(storage), **fields))))
    then = time.time() - age_s
    os.utime(storage.folder / claim_path(PART), (then, then))


def test_a_part_has_one_owner(storage: Storage) -> None:
    first, second = Claims(storage), Claims(storage)
    assert first.take(PART)
    assert not second.take(PART)
    assert first.take(PART)
    assert second.take(PARTS[2])
    assert read(storage).worker == first.worker
    assert read(storage).pid == os.getpid()


def test_a_claim_of_a_tebibyte_is_not_read_and_goes_by_its_age(storage: Storage) -> None:
    storage.put_new(claim_path(PART), b"")
    os.truncate(storage.folder / claim_path(PART), 1 << 40)
    assert not Claims(storage).take(PART)
    os.utime(storage.folder / claim_path(PART), (0, 0))
    assert Claims(storage).take(PART)


def test_of_many_workers_at_once_one_gets_the_part(storage: Storage) -> None:
    workers = [Claims(storage) for _ in range(8)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda w=w: got.append(w.take(PART))) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("age_s", "dead"), [(0, False), (DEAD_AFTER_S - 10, False), (DEAD_AFTER_S + 10, True)]
)
@pytest.mark.parametrize("fields", [{}, {"host": "elsewhere"}, {"machine": "another"}])
def test_a_claim_that_is_not_renewed_dies(
    storage: Storage, age_s: float, dead: bool, fields: dict[str, Any]
) -> None:
    assert Claims(storage).take(PART)
    change(storage, age_s=age_s, **fields)
    other = Claims(storage)
    assert other.take(PART) == dead
    assert (read(storage).worker == other.worker) == dead


def test_a_claim_of_a_process_that_is_gone_is_dead_at_once(storage: Storage) -> None:
    assert Claims(storage).take(PART)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    change(storage, pid=gone.pid)
    assert Claims(storage).take(PART)


def test_a_claim_of_a_dead_process_that_nobody_waited_for_is_dead(storage: Storage) -> None:
    assert Claims(storage).take(PART)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        change(storage, pid=child.pid, process_start=claims._process_start(child.pid))
        assert not Claims(storage).take(PART)
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Claims(storage).take(PART)


def test_a_pid_that_was_given_out_again_is_not_the_owner(storage: Storage) -> None:
    assert Claims(storage).take(PART)
    change(storage, process_start=read(storage).process_start + 1)
    assert Claims(storage).take(PART)


def test_another_machine_is_not_judged_by_pids(storage: Storage) -> None:
    assert Claims(storage).take(PART)
    gone = replace(read(storage), process_start=1)
    assert not may_run(gone)
    assert may_run(replace(gone, host="elsewhere"))
    assert may_run(replace(gone, machine="another boot"))


@pytest.mark.parametrize("pid", [2**22 + 1, 2**40])
def test_a_pid_that_cannot_be_is_nobodys(storage: Storage, pid: int) -> None:
    assert Claims(storage).take(PART)
    assert not may_run(replace(read(storage), pid=pid))


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"part":1}'])
def test_a_claim_that_cannot_be_understood_is_judged_by_its_age(
    storage: Storage, data: bytes
) -> None:
    storage.put(claim_path(PART), data)
    assert not Claims(storage).take(PART)
    then = time.time() - DEAD_AFTER_S - 10
    os.utime(storage.folder / claim_path(PART), (then, then))
    assert Claims(storage).take(PART)


def test_a_claim_is_renewed_while_the_work_runs_and_then_let_go(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RENEW_EVERY_S", 0.001)
    renewed = threading.Event()
    put = Storage.put

    def counting(self: Storage, path: str, data: bytes) -> None:
        put(self, path, data)
        if puts:
            renewed.set()
        puts.append(path)

    puts: list[str] = []
    worker, other = Claims(storage), Claims(storage)
    assert worker.take(PART)
    monkeypatch.setattr(Storage, "put", counting)
    before = threading.active_count()
    with worker.renewed(PART):
        assert renewed.wait(30), "renewed at least twice"
        assert not other.take(PART)
    assert threading.active_count() == before
    assert set(puts) == {claim_path(PART)}
    assert not read(storage).working
    assert other.take(PART)


def test_work_that_fails_lets_go_too(storage: Storage) -> None:
    worker = Claims(storage)
    assert worker.take(PART)
    with pytest.raises(KeyError), worker.renewed(PART):
        raise KeyError("the work")
    assert Claims(storage).take(PART)


def failing(*_: object) -> None:
    """A storage call that fails."""
    raise StorageError("claims", "to write", "no space", "Make room.")


@pytest.mark.parametrize("call", ["put_new", "get", "put"])
def test_trouble_with_a_claim_is_said_once_and_fails_nothing(
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
) -> None:
    monkeypatch.setattr(claims, "RENEW_EVERY_S", 0.001)
    assert Claims(storage).take(PART)
    change(storage, age_s=DEAD_AFTER_S + 10)
    monkeypatch.setattr(Storage, call, failing)
    worker, done = Claims(storage), []
    assert worker.take(PART)
    with worker.renewed(PART):
        time.sleep(0.02)
        done.append(PART)
    assert done == [PART]
    said = capsys.readouterr().err
    assert said.count("no space") == 1
    assert f"others may score {PART} too" in said


def test_workers_want_different_parts_first(storage: Storage) -> None:
    orders = [Claims(storage).in_own_order(PARTS) for _ in range(4)]
    assert all(sorted(order) == PARTS for order in orders)
    assert len({tuple(order[:5]) for order in orders}) == 4
