"""`stillroom bench replay`: it delivers and measures what it says, and catches a loader that does
not."""

import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError, MismatchError
from stillroom.cache.part import PartMeta
from stillroom.cache.shard_writer import ScoredBy
from stillroom.cache.store import Cache
from stillroom.replay import ReplayStream, StreamConfig
from stillroom.tools import bench_replay
from stillroom.tools.bench_data import made_up
from stillroom.tools.bench_peers import COLUMNS
from stillroom.tools.bench_replay_peers import (
    PeerSpeed,
    check_rows,
    loaders,
    measure_peer,
    packed,
    replay_order,
)
from stillroom.tools.bench_stream import (
    Delivered,
    Replayed,
    Resumed,
    Waited,
    alone,
    checksum,
    deliver,
    delivered_ids,
    resume,
    wait,
)

CONFIG = StreamConfig(batch_rows=4, block_rows=2, window_rows=2, threads=1)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    """Two parts, listed twice."""
    root = tmp_path_factory.mktemp("bench") / "cache"
    parts = []
    for number in range(2):
        sample = made_up(1500, 8, longest=200, seed=number)
        cache = Cache.open(root) if number else Cache.create(root, sample.identity)
        meta = PartMeta(
            policy_version=0,
            unit=f"{number:016x}",
            tokenizer_fingerprint=sample.identity.tokenizer_fingerprint,
            vocab_size=sample.identity.vocab_size,
            sampler={"temperature": 1.0},
        )
        scored_by = ScoredBy(teacher_s=0.0, scorer={"host": "test"})
        commit = cache.add_shard(meta, "0" * 32, sample.arrays, scored_by)
        assert commit is not None
        parts.append(commit.part)
    return Replayed(root=str(root), parts=tuple(parts), copies=2)


def test_an_epoch_delivers_every_position_of_every_copy(replayed: Replayed) -> None:
    found = deliver(replayed, CONFIG)
    assert found.positions == replayed.copies * len(replayed.parts) * 1500
    assert found.positions_s == found.positions / found.seconds > 0
    assert found.cores > 0
    ids = sum(checksum(row["topk_id"]) for row in replayed.rows())
    assert delivered_ids(replayed, CONFIG) == replayed.copies * ids


def test_peers_are_asked_for_the_streams_own_order(replayed: Replayed) -> None:
    rows = replayed.rows()
    order = replay_order(replayed, CONFIG, len(rows))
    with ReplayStream(replayed.source(), CONFIG) as stream:
        streamed = [row for _ in range(len(rows) // 4) for row in stream.next_batch().rows]
        batch = ReplayStream(replayed.source(), CONFIG).next_batch()
    assert order[: len(streamed)] == [row % len(rows) for row in streamed]
    assert sorted(order) != order
    first = next(packed([rows[i] for i in order], 4))
    assert set(first) == set(COLUMNS)
    assert checksum(first["topk_id"]) == sum(checksum(m.topk_id) for m in batch.micro_batches if m)


class _BeginsAgain:
    """Rows that come from the first one on each time that they are iterated."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows, self._at = rows, 0

    def __iter__(self) -> "_BeginsAgain":
        self._at = 0
        return self

    def __next__(self) -> Any:
        if self._at == len(self._rows):
            raise StopIteration
        self._at += 1
        return self._rows[self._at - 1]


@pytest.mark.parametrize("batch_rows", [2, 4, 7])
def test_packing_takes_one_epoch_of_a_loader_that_begins_again(batch_rows: int) -> None:
    row = dict.fromkeys(COLUMNS, np.zeros(3))
    batches = islice(packed(_BeginsAgain([row] * 4), batch_rows), 10)
    assert sum(len(batch["token"]) for batch in batches) == 12


def test_rows_that_were_not_asked_for_are_an_error() -> None:
    sums, order = [5, 6, 7], [2, 0, 1]
    check_rows("peer", [7, 5], sums, order)
    check_rows("peer", [6, 5], sums, None)
    for found, wanted in (([5, 7], order), ([], order), ([6, 6], None), ([8], None)):
        with pytest.raises(MismatchError, match="rows that were asked for"):
            check_rows("peer", found, sums, wanted)


def test_a_trainer_faster_than_the_stream_waits_and_a_slow_one_does_not(
    replayed: Replayed,
) -> None:
    hasty = wait(replayed, CONFIG, 1e12, 5.0)
    with ReplayStream(replayed.source(), CONFIG) as stream:
        assert hasty.steps == stream.steps_per_epoch
    assert 0 < hasty.share <= 1
    assert hasty.first_batch_s > 0
    one = wait(replayed, CONFIG, 1e12, 0.0)
    assert (one.steps, one.share) == (1, 0.0)


def test_it_resumes_far_away(replayed: Replayed) -> None:
    near, far = resume(replayed, CONFIG)
    assert (near.step, far.step) == (1, 1_000_000)
    assert min(near.load_s, near.first_batch_s, far.load_s, far.first_batch_s) > 0


def test_a_measurement_has_a_process_of_its_own() -> None:
    assert alone(os.getpid) != os.getpid()
    assert alone(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        alone(divmod, 7, 0)
    with pytest.raises(TimeoutError):
        alone(time.sleep, 60, most_s=0.01)
    with pytest.raises(EOFError):
        alone(os._exit, 3)


def _here(measure: Callable[..., Any], *args: Any) -> Any:
    return measure(*args)


def test_it_measures_a_caches_own_rows_and_writes_nothing(
    replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_replay, "alone", _here)
    root = Path(replayed.root)
    before = sorted(root.rglob("*"))
    found = bench_replay.bench_replay(
        replayed.root, positions=1600, topk=8, tokens_s=1e9, with_peers=False, rows=100
    )
    bench_replay.print_figures(found)
    assert sorted(root.rglob("*")) == before
    assert found.rows >= 100
    assert found.positions == 3000 * found.copies
    for row in found.streams:
        assert row.first.positions == row.later.positions == found.positions
    assert [row.threads for row in found.streams[:2]] == [1, 2]
    assert [row.all_kept for row in found.streams] == [False, False, False, True]
    assert found.default is found.streams[2]
    assert found.s3 is None


def test_other_loaders_stand_beside_the_default_stream(capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = (Delivered(positions=n, seconds=2.0, cores=1, memory_mb=3) for n in (8000, 2000))
    kept = Delivered(positions=80_000, seconds=2.0, cores=1, memory_mb=3)
    figures = bench_replay.ReplayFigures(
        rows=4,
        positions=8000,
        copies=1,
        topk=8,
        streams=[
            bench_replay.Streamed(threads=2, first=quick, later=quick),
            bench_replay.Streamed(threads=2, first=quick, later=kept, all_kept=True),
        ],
        peers=[
            PeerSpeed(name="neat", first=slow, later=quick),
            PeerSpeed(name="stuck", failed="it took longer than 180 s"),
        ],
        s3=None,
        waited=Waited(tokens_s=1.0, first_batch_s=0.5, share=0.1, later_share=0.01, steps=40),
        resumed=[Resumed(step=1, load_s=0.1, first_batch_s=0.2)],
    )
    bench_replay.print_figures(figures)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["neat"] == ["neat", "1,000", "4,000", "1", "3", "4", "1"]
    assert "it took longer than 180 s" in " ".join(lines["stuck"])


def test_a_loader_that_fails_or_takes_too_long_has_no_figures(
    replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_replay, "PEER_S", 30.0)
    monkeypatch.setattr(bench_replay, "measure_peer", end_at_once)
    failed = bench_replay._measured_peer("neat", replayed, CONFIG)
    monkeypatch.setattr(bench_replay, "PEER_S", 0.2)
    monkeypatch.setattr(bench_replay, "measure_peer", never_end)
    late = bench_replay._measured_peer("slow", replayed, CONFIG)
    for row in (failed, late):
        assert row.failed
        assert row.first is row.later is None


def end_at_once(*args: Any) -> None:
    """A loader whose process dies."""
    os._exit(3)


def never_end(*args: Any) -> None:
    """A loader that gives nothing."""
    time.sleep(600)


def test_a_cache_without_scores_is_refused(tmp_path: Path) -> None:
    Cache.create(tmp_path, made_up(200, 4).identity)
    with pytest.raises(InputError, match="scored parts"):
        bench_replay.bench_replay(str(tmp_path), positions=1, topk=4, tokens_s=1.0)


@pytest.mark.parametrize("flag", ["--positions", "--rows", "--tokens-per-s"])
def test_wrong_figures_are_refused(run: Any, flag: str) -> None:
    ran = run("bench", "replay", flag, "0")
    assert ran.status == 2
    assert "tokens_per_s" in ran.err


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:.*rows\.tar")  # webdataset does not close what it has read
def test_other_loaders_give_the_same_rows(replayed: Replayed) -> None:
    rows = replayed.rows()
    order = replay_order(replayed, CONFIG, len(rows))
    asked = sum(len(rows[i]["sampled_logprob"]) for i in order)
    assert loaders()
    for name in loaders():
        found = alone(measure_peer, name, replayed, CONFIG)
        assert found.failed is None
        assert found.first is not None, name
        assert found.later is not None, name
        assert found.first.positions == found.later.positions, name
        assert found.later.positions == (asked if "our order" in name else 3000), name


@pytest.mark.slow
def test_from_an_object_store(run: Any) -> None:
    small = ("--positions", "2000", "--topk", "8", "--rows", "20", "--no-peers")
    ran = run("bench", "replay", *small, "--s3", "--json")
    assert ran.status == 0, ran.err
    value = ran.json()
    assert value["s3"]["speed"]["positions"] == 2000
    assert value["s3"]["requests"] > 5
    assert value["waited"]["steps"] >= 1
