"""Claims: one worker a part while it lives, and none that blocks for longer than it must."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import claims, jsonfile
from stillroom.cache.claims import (
    DEAD_AFTER_S,
    STALLED_AFTER_S,
    Claim,
    Claims,
    claim_path,
    may_run,
)
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


class Watch:
    """A stopwatch whose time the test sets."""

    now = 0.0

    def __init__(self) -> None:
        """Start."""
        self.start = Watch.now

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return Watch.now - self.start


@dataclass(slots=True)
class Renewals:
    """How often a claim might have been renewed, and how often it was."""

    chances: int = 0
    puts: int = 0

    def go_on(self) -> bool:
        """Whether a claim is renewed from now on."""
        self._pass(2)
        before = self.puts
        self._pass(3)
        return self.puts > before

    def _pass(self, chances: int) -> None:
        last, end = self.chances + chances, time.monotonic() + 30
        while self.chances < last:
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> Renewals:
    """Renewals come thick and fast, and each is noted; work has the test's time."""
    made, put, stalled = Renewals(), Storage.put, claims._Work.stalled

    def noting(self: Storage, path: str, data: bytes) -> None:
        put(self, path, data)
        made.puts += 1

    def counting(self: claims._Work) -> bool:
        made.chances += 1
        return stalled(self)

    monkeypatch.setattr(Watch, "now", 0.0)
    monkeypatch.setattr(claims, "Stopwatch", Watch)
    monkeypatch.setattr(claims, "RENEW_EVERY_S", 0.001)
    monkeypatch.setattr(Storage, "put", noting)
    monkeypatch.setattr(claims._Work, "stalled", counting)
    return made


def test_work_that_does_not_get_on_is_not_renewed(
    storage: Storage, renewals: Renewals, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Claims(storage)
    assert worker.take(PART)
    with worker.renewed(PART) as progress:
        for _ in range(3):
            Watch.now += STALLED_AFTER_S - 1
            progress()
        Watch.now += STALLED_AFTER_S - 1
        assert renewals.go_on()
        Watch.now += 2
        assert not renewals.go_on()
        change(storage, age_s=DEAD_AFTER_S + 1)
        progress()
        assert renewals.go_on(), "a teacher that was only slow goes on with its part"
        assert not Claims(storage).take(PART)
    said = capsys.readouterr().err
    assert said == f"  warning: others may do {PART} too: nothing came of it for 600 s\n"


def test_a_claim_that_another_took_over_is_left_to_it(storage: Storage, renewals: Renewals) -> None:
    slow, other = Claims(storage), Claims(storage)
    assert slow.take(PART)
    with slow.renewed(PART) as progress:
        Watch.now += STALLED_AFTER_S + 1
        assert not renewals.go_on()
        change(storage, age_s=DEAD_AFTER_S + 1)
        assert other.take(PART)
        progress()
        assert not renewals.go_on()
    found = read(storage)
    assert (found.worker, found.working) == (other.worker, True)


@pytest.mark.parametrize("fields", [{"working": False}, {"age_s": DEAD_AFTER_S + 1}])
def test_a_claim_that_another_took_over_and_lost_is_taken_back(
    storage: Storage, renewals: Renewals, fields: dict[str, Any]
) -> None:
    slow, other = Claims(storage), Claims(storage)
    assert slow.take(PART)
    with slow.renewed(PART) as progress:
        Watch.now += STALLED_AFTER_S + 1
        assert not renewals.go_on()
        change(storage, age_s=DEAD_AFTER_S + 1)
        assert other.take(PART)
        change(storage, **fields)
        progress()
        assert renewals.go_on()
        found = read(storage)
        assert (found.worker, found.working) == (slow.worker, True)
        assert not Claims(storage).take(PART)


@pytest.mark.parametrize("fields", [{}, {"host": "elsewhere"}])
@pytest.mark.parametrize(("ahead_s", "dead"), [(DEAD_AFTER_S - 10, False), (1e6, True)])
def test_a_claim_from_the_future_is_as_dead_as_one_from_the_past(
    storage: Storage, fields: dict[str, Any], ahead_s: float, dead: bool
) -> None:
    """The storage's clock was set back since it was renewed."""
    assert Claims(storage).take(PART)
    change(storage, age_s=-ahead_s, **fields)
    other = Claims(storage)
    assert other.is_held(PART) == (not dead)
    assert other.take(PART) == dead


def test_a_claim_is_live_for_one_who_knew_the_clock_before_it_was_set_forward(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Claims(storage)
    before = waiting._clock.now() - 1e6
    monkeypatch.setattr(waiting._clock, "now", lambda: before)
    assert Claims(storage).take(PART)
    assert waiting.is_held(PART)
    assert not waiting.take(PART)


def test_who_waits_asks_for_a_live_claim_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it was renewed is asked only once it may be dead."""
    assert Claims(storage).take(PART)
    waiting = Claims(storage)
    assert not waiting.take(PART)
    asked: list[str] = []
    for name in ("get", "entry", "put", "put_new", "list"):
        real = getattr(Storage, name)

        def noting(
            self: Storage, path: str, *args: Any, _name: str = name, _real: Any = real
        ) -> Any:
            asked.append(_name)
            return _real(self, path, *args)

        monkeypatch.setattr(Storage, name, noting)
    assert [waiting.is_held(PART) for _ in range(5)] == [True] * 5
    assert asked == ["get"] * 5
    now = waiting._clock.now
    monkeypatch.setattr(waiting._clock, "now", lambda: now() + DEAD_AFTER_S + 1)
    assert not waiting.is_held(PART)
    assert asked[5:] == ["get", "entry"]


@pytest.mark.parametrize("fields", [{"working": False}, {"process_start": 1}, None])
def test_a_part_that_is_let_go_or_whose_owner_is_gone_is_not_held(
    storage: Storage, fields: dict[str, Any] | None
) -> None:
    assert Claims(storage).take(PART)
    if fields is None:
        storage.delete(claim_path(PART))
    else:
        change(storage, **fields)
    assert not Claims(storage).is_held(PART)


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
    assert f"others may do {PART} too" in said


def test_workers_want_different_parts_first(storage: Storage) -> None:
    orders = [Claims(storage).in_own_order(PARTS) for _ in range(4)]
    assert all(sorted(order) == PARTS for order in orders)
    assert len({tuple(order[:5]) for order in orders}) == 4
