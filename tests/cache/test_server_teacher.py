"""The teacher behind servers, end to end on the loopback: the right scores, each once, whatever the
servers do in between."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache import server_run
from stillroom.cache.canary import LENGTHS
from stillroom.cache.errors import (
    ConfigError,
    CorruptError,
    InputError,
    MismatchError,
    NumericsError,
    StorageError,
)
from stillroom.cache.score import score
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.server_teacher import ServerTeacher
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig, stats_of
from tests.cache.fake_server import FILES, FakeServer, Fault
from tests.cache.fakes import FakeTeacher, dense_scores, make_meta, random_rollouts

SPEC = ScoreSpec(topk=5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, _no_fsync: None) -> None:
    """Nobody waits for long before a server is tried again."""
    monkeypatch.setattr(server_run, "WAIT_S", (0.01, 0.05))


@contextmanager
def serving(count: int = 1, protocol: str = "vllm") -> Iterator[list[FakeServer]]:
    """Servers of the same table."""
    servers = [FakeServer(protocol) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def teacher_of(servers: Sequence[FakeServer], **config: Any) -> ServerTeacher:
    """A teacher that they run."""
    urls = tuple(server.url for server in servers)
    protocol = servers[0].protocol
    settings = ServerConfig(urls=urls, protocol=protocol, timeout_s=20, **config)
    return ServerTeacher(FILES, TeacherConfig(model="fake", backend="server", server=settings))


def make_rows(count: int = 30, seed: int = 0) -> list[ScoreRow]:
    """Rows of random ids, some of whose tokens are scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        token = rng.integers(0, 40, rng.integers(3, 25)).astype(np.uint32)
        picked = rng.random(len(token) - 1) < 0.7
        rows.append(ScoreRow(token, np.union1d(np.flatnonzero(picked) + 1, [len(token) - 1])))
    return rows


def scored(teacher: ServerTeacher, rows: list[ScoreRow], spec: ScoreSpec = SPEC) -> list[RowScores]:
    """Scores in the rows' order, each once."""
    found = list(teacher.score(rows, spec))
    assert len(dict(found)) == len(found) == len(rows)
    return [dict(found)[i] for i in range(len(rows))]


def assert_right(rows: list[ScoreRow], found: list[RowScores], spec: ScoreSpec = SPEC) -> None:
    """They are the table's."""
    logit_VV = FakeTeacher().logit_VV
    for row, scores in zip(rows, found, strict=True):
        logit_PV = logit_VV[row.token[row.targets - 1]]
        expected = dense_scores(logit_PV, row.token[row.targets], spec.topk, spec.mass)
        for name in ("topk_id", "topk_count"):
            assert (getattr(scores, name) == getattr(expected, name)).all()
        for name in ("topk_logprob", "tail_logprob", "sampled_logprob"):
            mine, theirs = getattr(scores, name), getattr(expected, name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("mass", [1.0, 0.8])
@pytest.mark.parametrize("protocol", ["vllm", "trl"])
def test_scores_are_those_of_the_model(protocol: str, mass: float) -> None:
    spec = ScoreSpec(topk=7, mass=mass)
    rows = make_rows()
    with serving(2, protocol) as servers:
        teacher = teacher_of(servers)
        assert_right(rows, scored(teacher, rows, spec), spec)
        assert sum(len(server.scored()) for server in servers) == len(rows) + 2 * len(LENGTHS)
    assert stats_of(teacher) == {"retries": 0, "tokens_in_flight": 0, "servers": 0}


def test_the_numeric_class_names_protocol_version_and_dtype() -> None:
    with serving() as [server]:
        assert teacher_of([server]).numeric_class == "server-vllm-0.32.0-float32"
        server.version = None
        assert teacher_of([server]).numeric_class == "server-vllm-float32"
    with serving(protocol="trl") as servers:
        assert teacher_of(servers).numeric_class == "server-trl-float32"


def test_the_longest_row_is_that_of_the_server_that_reads_least() -> None:
    with serving(2) as servers:
        servers[1].models = [{"id": "m", "max_model_len": 200}]
        teacher = teacher_of(servers)
        scored(teacher, make_rows(40))
        assert teacher.longest_row == 199
        longer = ScoreRow(np.zeros(200, np.uint32), np.array([1]))
        with pytest.raises(InputError, match=r"^row 1: .*199 tokens; got 200 tokens"):
            teacher.score([*make_rows(1), longer], ScoreSpec(topk=5))
    with serving(protocol="trl") as servers:
        assert teacher_of(servers).longest_row is None


def test_many_rows_are_at_work_and_their_tokens_bounded() -> None:
    rows = [ScoreRow(np.arange(10, dtype=np.uint32), np.array([9])) for _ in range(20)]
    with serving() as [server]:
        teacher = teacher_of([server], max_tokens_in_flight=45)

        def hold() -> None:
            server.most_tokens, server.hold_until = 0, 4

        server.faults = [Fault(token=list(range(10)), then=hold)]
        assert len(list(teacher.score(rows, SPEC))) == 20
        assert server.most_tokens == 40


FAULTS = {
    "busy": Fault(status=429, times=3),
    "error": Fault(status=500, times=3),
    "dropped": Fault(drop=True, times=3),
    "cut": Fault(cut=True, times=3),
    "damaged": Fault(change=lambda answer: b"{"),
}


@pytest.mark.parametrize(("kind", "count"), [*((kind, 2) for kind in FAULTS), ("damaged", 1)])
def test_failures_lose_nothing_and_double_nothing(cache: Cache, kind: str, count: int) -> None:
    row = random_rollouts(1, 12).to_pylist()[4]
    token = row["prompt"] + row["completion"]
    fault = replace(FAULTS[kind], token=token)
    other = Cache.create(f"{cache.storage.root}-other", cache.identity)
    for each in (cache, other):
        each.add_part(random_rollouts(1, 12), make_meta(1))
    with serving(count) as servers:
        teacher = teacher_of(servers)
        for server in servers:
            server.faults = [fault]
        report = score(cache, teacher)
        asked = [asked for server in servers for asked in server.scored()].count(token)
    assert stats_of(teacher)["retries"] == FAULTS[kind].times
    assert asked == FAULTS[kind].times + 1
    assert len(report.scored) == len(cache.commits()) == 1
    assert score(other, FakeTeacher()).positions == report.positions
    for part in cache.commits():
        mine, theirs = (each.read(part) for each in (cache, other))
        assert (mine["topk_id"] == theirs["topk_id"]).all()
        np.testing.assert_allclose(mine["sampled_logprob"], theirs["sampled_logprob"], rtol=1e-5)


def test_nan_commits_nothing_and_names_part_row_and_server(cache: Cache) -> None:
    def spoil(answer: dict[str, Any]) -> bytes:
        return b'{"choices":[{"index":0,"prompt_logprobs":' + _nulls(answer) + b"}]}"

    cache.add_part(random_rollouts(1, 3), make_meta(1))
    with serving() as [server]:
        teacher = teacher_of([server])
        token = _rows_of(cache)[1]
        server.faults = [Fault(token=token, change=spoil)]
        with pytest.raises(NumericsError, match=rf"^v000000-\w+, row 1, {server.url}, position 0"):
            score(cache, teacher)
        assert server.scored().count(token) == 1
    assert cache.commits() == {}


def _nulls(answer: dict[str, Any]) -> bytes:
    listed = answer["choices"][0]["prompt_logprobs"]
    for entry in listed[1:]:
        for value in entry.values():
            value["logprob"] = None
    return json.dumps(listed).encode()


def _rows_of(cache: Cache) -> list[list[int]]:
    [part] = cache.unscored()
    table = cache.read_part(part)[0]
    return [
        prompt + completion
        for prompt, completion in zip(
            table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True
        )
    ]


def test_an_answer_that_is_damaged_twice_names_row_and_server(cache: Cache) -> None:
    cache.add_part(random_rollouts(1, 3), make_meta(1))
    with serving(2) as servers:
        teacher = teacher_of(servers)
        token = _rows_of(cache)[2]
        for server in servers:
            server.faults = [Fault(times=2, token=token, change=lambda answer: b"[]")]
        with pytest.raises(CorruptError, match=r"^row 2, http://127\.0\.0\.1:\d+: expected a JSON"):
            score(cache, teacher)
        assert sum(server.scored().count(token) for server in servers) == 2
    assert cache.commits() == {}


def test_servers_of_different_weights_are_refused_by_name(cache: Cache) -> None:
    cache.add_part(random_rollouts(1, 3), make_meta(1))
    with serving(2) as servers:
        teacher = teacher_of(servers)
        servers[1].logit_VV = FakeTeacher(noise=0.05).logit_VV
        done, token = threading.Event(), _rows_of(cache)[0]

        def hold() -> None:
            done.wait(20)

        for server in servers:
            server.faults = [Fault(token=token, then=hold)]
        try:
            with pytest.raises(MismatchError) as caught:
                score(cache, teacher)
        finally:
            done.set()
        assert all(server.url in str(caught.value) for server in servers)
    assert cache.commits() == {}


def test_a_server_that_comes_back_with_other_weights_is_refused() -> None:
    rows = make_rows()
    with serving() as [server]:
        teacher = teacher_of([server])
        assert_right(rows, scored(teacher, rows))

        def restart() -> None:
            server.logit_VV = FakeTeacher(noise=0.05).logit_VV

        server.faults = [Fault(token=rows[7].token.tolist(), drop=True, then=restart)]
        found: list[int] = []
        with pytest.raises(MismatchError, match=f"^{server.url}: expected logprobs within"):
            found.extend(i for i, _ in teacher.score(rows, SPEC))
        assert 7 not in found
        with pytest.raises(MismatchError):
            list(teacher.score(rows, SPEC))


def test_a_server_that_is_down_is_left_aside_and_then_used() -> None:
    rows = make_rows(40)
    with serving() as [server]:
        late = FakeServer()
        port = late.port
        late.close()
        teacher = teacher_of([server, late], max_tokens_in_flight=60)

        def hold() -> None:
            server.hold_until = 10**6  # answers nothing until the other one is at work

        longest = max(rows, key=lambda row: len(row.token)).token.tolist()
        server.faults = [Fault(token=longest, then=hold)]
        found = teacher.score(rows, SPEC)
        results = [next(found)]
        back = FakeServer(port=port)
        back.faults = [Fault(then=lambda: _let_go(server))]
        try:
            results += found
            assert back.scored()
        finally:
            back.close()
    assert_right(rows, [dict(results)[i] for i in range(len(rows))])


def _let_go(server: FakeServer) -> None:
    server.hold_until = 1
    with server._lock:
        server._lock.notify_all()


def test_no_server_at_all_is_an_error_that_names_them() -> None:
    with serving(2) as servers:
        pass
    names = "; ".join(f"{server.url}: ConnectError" for server in servers).replace(";", ".*;")
    with pytest.raises(StorageError, match=f"^the teacher's servers: .*{names}"):
        teacher_of(servers, patience_s=0)


def test_what_the_protocols_cannot_give_is_refused_before_anything_is_asked() -> None:
    with serving() as [server]:
        padded = replace(FILES, logit_width=48)
        settings = ServerConfig(urls=(server.url,))
        config = TeacherConfig(model="fake", backend="server", server=settings)
        with pytest.raises(ConfigError, match=r"48 rows.*exact_tail"):
            ServerTeacher(padded, config)
        teacher = teacher_of([server])
        rows = make_rows(2)
        for spec in (
            ScoreSpec(topk=5, temperature=0.7),
            ScoreSpec(topk=5, extra=2, extra_kind="tail"),
            ScoreSpec(topk=5, extra=2, extra_kind="student"),
        ):
            with pytest.raises(ConfigError, match=r"transformers, and vllm with exact_tail"):
                teacher.score(rows, spec)
        long = ScoreRow(np.zeros(257, np.uint32), np.array([1]))
        with pytest.raises(InputError, match=r"^row 2: .*256 tokens; got 257 tokens"):
            teacher.score([*rows, long], SPEC)
        assert list(teacher.score([], SPEC)) == []
        assert server.scored() == []
    with (
        serving(protocol="trl") as servers,
        pytest.raises(ConfigError, match=r"at most 20 with the protocol trl; got 21, .* a map"),
    ):
        teacher_of(servers).score(rows, ScoreSpec(topk=21))


def test_a_job_that_stops_early_leaves_no_thread_behind() -> None:
    names = {thread.name for thread in threading.enumerate()}
    with serving() as servers:
        found = teacher_of(servers).score(make_rows(), SPEC)
        next(found)
        found.close()  # type: ignore[attr-defined]
    left = {thread.name for thread in threading.enumerate()} - names
    assert not [name for name in left if "process_request" not in name]
