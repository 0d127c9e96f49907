"""The whole life of a cache on S3: made, filled, scored, raced for, checked, replayed, and faults
in between."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache import commits
from stillroom.cache.errors import MismatchError, StillroomError, StorageError
from stillroom.cache.score import score
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from stillroom.cache.zarr_layout import OBJECT_NAME
from stillroom.replay import ReplayStream, Source, StreamConfig
from stillroom.tools.cli import main
from tests.cache.fakes import (
    FakeTeacher,
    commit_shard,
    make_identity,
    make_meta,
    random_arrays,
    random_rollouts,
    same_bits,
)
from tests.cache.faulty_proxy import Kind
from tests.cache.s3 import QUICKLY, S3, SECRET

ROOT = Path(__file__).resolve().parents[2]
PARTS = 3
ROWS = 6


def add_parts(cache: Cache, count: int = PARTS) -> list[str]:
    """Add parts of a few short rollouts."""
    for number in range(count):
        assert cache.add_part(random_rollouts(number, ROWS), make_meta(number))
    return cache.parts()


def quick_cache(s3: S3) -> Cache:
    """A new cache on S3 with parts, whose failed requests are repeated at once."""
    root = s3.new_root()
    Cache.create(root, make_identity())
    cache = Cache(Storage(root, **QUICKLY), make_identity())
    add_parts(cache)
    return cache


def everything(root: str) -> dict[str, bytes]:
    """Every object below a root, whatever its name."""
    storage = Storage(root)
    return {entry.path: storage.get(entry.path) for entry in storage.list_all()}


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """A command's status, output and messages."""
    capsys.readouterr()
    status = main(list(args))
    out, err = capsys.readouterr()
    return status, out, err


def test_a_cache_on_s3_holds_what_one_on_a_disk_holds(s3: S3, tmp_path: Path) -> None:
    """Scores and batches are those of a local cache of the same rollouts."""
    caches = [Cache.create(root, make_identity()) for root in (s3.new_root(), tmp_path / "local")]
    for cache in caches:
        parts = add_parts(cache)
        assert score(cache, FakeTeacher()).scored
        assert cache.unscored() == []
    remote, local = caches
    for part in parts:
        first, second = remote.read(part), local.read(part)
        assert first.keys() == second.keys()
        assert all(same_bits(first[name], second[name]) for name in first)
    config = StreamConfig(batch_rows=4, max_tokens=64, seed=3)
    snapshots = [cache.open_snapshot(cache.snapshot().id) for cache in caches]
    streams = [
        ReplayStream(Source(cache, snapshot), config)
        for cache, snapshot in zip(caches, snapshots, strict=True)
    ]
    for left, right in itertools.islice(zip(*streams, strict=True), 7):
        assert left.rows == right.rows
        for a, b in zip(left.micro_batches, right.micro_batches, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert same_bits(a.topk_logprob, b.topk_logprob)
                assert same_bits(a.token, b.token)


def test_a_stream_has_many_requests_on_their_way_at_once(s3: S3) -> None:
    cache = quick_cache(s3)
    score(cache, FakeTeacher())
    snapshot = cache.open_snapshot(cache.snapshot().id)
    s3.proxy.behave()
    s3.proxy.misbehave("stall", "GET", OBJECT_NAME, times=PARTS * ROWS)
    config = StreamConfig(batch_rows=PARTS * ROWS, max_tokens=64, block_rows=1)
    with ReplayStream(Source(cache, snapshot), config) as stream, ThreadPoolExecutor(1) as trainer:
        batch = trainer.submit(stream.next_batch)
        late = time.monotonic() + 20
        while s3.proxy.count("GET", OBJECT_NAME) < 8 and time.monotonic() < late:
            time.sleep(0.02)
        unanswered = s3.proxy.count("GET", OBJECT_NAME)
        s3.proxy.behave()
        assert batch.result().num_positions == snapshot.positions
    assert unanswered >= 8


def test_a_cache_is_made_once(s3: S3) -> None:
    root = s3.new_root()
    Cache.create(root, make_identity())
    s3.proxy.behave()
    Cache.create(root, make_identity())
    assert s3.proxy.count("PUT") == 0
    with pytest.raises(MismatchError, match="topk"):
        Cache.create(root, make_identity(topk=3))


def test_commands_look_at_a_cache_on_s3(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    cache = quick_cache(s3)
    score(cache, FakeTeacher())
    cache.snapshot()
    root = cache.storage.root
    part = cache.parts()[0]
    before = everything(root)
    looks = ("ls", "show", f"show {part}", "verify", "verify --deep", "stats", "gc --dry-run")
    for command, *args in map(str.split, looks):
        status, out, err = run(command, root, *args, capsys=capsys)
        assert status == 0, (command, args, out, err)
    probes = {path: data for path, data in everything(root).items() if path.startswith("probe/")}
    assert everything(root) == before | probes, "gc asks the store for its time with a probe"


def test_verify_finds_a_damaged_shard_on_s3(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    cache = quick_cache(s3)
    score(cache, FakeTeacher())
    shard = max(cache.storage.list("scores"), key=lambda entry: entry.size_bytes)
    data = bytearray(cache.storage.get(shard.path))
    data[len(data) // 3] ^= 1
    cache.storage.put(shard.path, bytes(data))
    status, out, _ = run("verify", cache.storage.root, "--deep", capsys=capsys)
    assert status != 0
    assert shard.path.split("/")[1] in out


@pytest.mark.dist
def test_of_two_scorers_each_part_is_committed_by_one(s3: S3) -> None:
    cache = quick_cache(s3)
    parts = add_many(cache, 12)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.s3_scorer", cache.storage.root],
            cwd=ROOT,
            env=os.environ | s3.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    outs = [start(child) for child in children]
    scored = [out().split() for out in outs]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(scored[0] + scored[1]) == parts
    assert sorted(cache.commits()) == parts
    for part in parts:
        assert len(cache.read(part)["prompt_length"]) == ROWS


def add_many(cache: Cache, count: int) -> list[str]:
    """Add more parts."""
    for number in range(PARTS, count):
        cache.add_part(random_rollouts(number, ROWS), make_meta(number))
    return cache.parts()


def start(child: "subprocess.Popen[str]") -> Callable[[], str]:
    """Let a child begin; returns what waits for its output."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return lambda: child.communicate(timeout=60)[0]


def test_a_store_that_ignores_conditions_gets_no_cache(s3: S3) -> None:
    s3.proxy.ignores_conditions = True
    root = s3.new_root()
    with pytest.raises(StorageError, match="a second put of the same key to be refused") as refused:
        Cache.create(root, make_identity())
    assert "ignores conditional puts" in str(refused.value)
    assert all(path.startswith("probe/") for path in everything(root))


def test_a_store_that_has_begun_to_ignore_conditions_gets_no_scores(s3: S3) -> None:
    cache = quick_cache(s3)
    before = everything(cache.storage.root)
    s3.proxy.ignores_conditions = True
    with pytest.raises(StorageError, match="a second put of the same key to be refused"):
        score(cache, FakeTeacher())
    after = everything(cache.storage.root)
    assert all(path in before or path.startswith("probe/") for path in after)
    assert all(after[path] == data for path, data in before.items())


def test_no_secret_is_written_or_printed(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    token = "session/token+0123456789"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SESSION_TOKEN", token)
        cache = quick_cache(s3)
        score(cache, FakeTeacher())
        cache.snapshot()
        printed = [run(name, cache.storage.root, capsys=capsys) for name in ("show", "verify")]
        for kind in ("deny", "refuse", "drop"):
            s3.proxy.misbehave(kind, times=10**6)
            for call in (cache.parts, cache.snapshot, lambda: cache.storage.put("a", b"")):
                with pytest.raises(StillroomError) as failed:
                    call()
                printed.append((0, str(failed.value), repr(failed.value.__cause__)))
            s3.proxy.behave()
    said = "".join(out + err for _, out, err in printed)
    assert "AccessDenied" in said
    for secret in (SECRET, token):
        assert secret not in said
        assert not any(secret.encode() in data for data in everything(cache.storage.root).values())


@pytest.mark.parametrize("command", ["show", "verify", "ls"])
def test_commands_do_not_repeat_an_address_with_a_secret(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(command, "s3://user:hush@bucket/cache", capsys=capsys)
    assert status != 0
    assert "AWS_SECRET_ACCESS_KEY" in err
    assert "hush" not in out + err


@pytest.mark.parametrize("kind", ["refuse", "drop", "fail", "lose", "truncate"])
def test_scoring_survives_what_can_be_repeated(s3: S3, kind: Kind) -> None:
    """A third of all requests go wrong, each in the same way."""
    cache = quick_cache(s3)
    answer, lucky = s3.proxy.answer, itertools.count()

    def unlucky(*args: Any) -> Any:
        if next(lucky) % 3 == 0:
            s3.proxy.misbehave(kind)
        return answer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3.proxy, "answer", unlucky)
        report = score(cache, FakeTeacher())
        snapshot = cache.snapshot()
    s3.proxy.behave()
    assert sorted(report.scored) == cache.parts()
    assert [commit.part for commit in cache.open_snapshot(snapshot.id).commits] == cache.parts()
    for part in cache.parts():
        assert len(cache.read(part)["prompt_length"]) == ROWS


@pytest.mark.parametrize("path", ["commits/", "scores/"])
def test_what_cannot_be_repeated_is_an_error_and_loses_nothing(
    s3: S3, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "BACKOFF_S", 0.0)
    cache = quick_cache(s3)
    commit_shard(cache, random_arrays(0, 40, ROWS), 0)
    before = everything(cache.storage.root)
    s3.proxy.misbehave("refuse", "PUT", path, times=10**6, status=503)
    with pytest.raises(StorageError, match=rf"{path}.*expected to write it; got .*503"):
        score(cache, FakeTeacher())
    s3.proxy.behave()
    after = everything(cache.storage.root)
    assert all(after[name] == data for name, data in before.items())
    assert len(cache.commits()) == 1
    assert sorted(score(cache, FakeTeacher()).scored) == cache.parts()[1:]
    assert cache.unscored() == []


@pytest.mark.parametrize("shard_format", ["zarr", "parquet"])
def test_a_shard_costs_few_requests(s3: S3, shard_format: str) -> None:
    """One to open it; then one for where rows begin and one for the rows, be it a few or all."""
    cache = Cache.create(s3.new_root(), make_identity(shard_format=shard_format))
    arrays = random_arrays(0, 9000, 700)
    commit = commit_shard(cache, arrays)
    s3.proxy.behave()
    shard = cache.shard(commit)
    assert s3.proxy.count() == 1
    whole = shard.all_rows()
    assert s3.proxy.count() == 3
    assert all(same_bits(whole[n], arrays[n]) for n in ("topk_id", "token", "sampled_logprob"))
    again = cache.shard(commit)
    s3.proxy.behave()
    rows = again.rows(300, 316)
    assert s3.proxy.count() == 2
    assert np.array_equal(rows["rollout_id"], arrays["rollout_id"][300:316])
    s3.proxy.behave()
    again.rows(600, 616)
    assert s3.proxy.count() == 1
