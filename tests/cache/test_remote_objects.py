"""Remote objects: settings from the environment, few requests, and faults of the network."""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from stillroom.cache import commits, remote_objects
from stillroom.cache.claims import Claims
from stillroom.cache.commits import commit_path, put_commit, read_commit
from stillroom.cache.errors import ConfigError, CorruptError, MissingError, StorageError
from stillroom.cache.pins import pin
from stillroom.cache.ranges import GAP_BYTES
from stillroom.cache.storage import Storage
from tests.cache.fakes import make_meta
from tests.cache.faulty_proxy import Kind
from tests.cache.s3 import QUICKLY, S3, SECRET, SOON
from tests.cache.test_commits import make_commit

BEFORE: list[Kind] = ["refuse", "drop"]
AFTER: list[Kind] = ["fail", "lose"]
PART = make_meta(1).name
READS: dict[str, Callable[[Storage], object]] = {
    "get": lambda storage: storage.get("a/b"),
    "get_ranges": lambda storage: storage.get_ranges("a/b", [2], [3]),
    "size": lambda storage: storage.size("a/b"),
    "list": lambda storage: [entry.path for entry in storage.list("a")],
}
FOUND = {"get": b"0123456789", "get_ranges": [b"234"], "size": 10, "list": ["a/b"]}


@pytest.fixture
def storage(s3: S3) -> Storage:
    """A storage with one object, `a/b`."""
    made = Storage(s3.new_root(), **QUICKLY)
    made.put_new("a/b", b"0123456789")
    s3.proxy.behave()
    return made


def header(s3: S3, name: str) -> str:
    """A header of the last request."""
    return s3.proxy.requests[-1].headers.get(name, "")


# settings


def test_the_environment_is_enough(s3: S3) -> None:
    storage = Storage(s3.new_root())
    assert storage.put_new("a/b", b"x")
    assert "/us-east-1/s3/aws4_request" in header(s3, "authorization")
    assert header(s3, "host") == s3.proxy.url.removeprefix("http://")
    assert s3.proxy.requests[-1].path == f"/{storage.root.removeprefix('s3://')}/a/b"
    assert not header(s3, "x-amz-security-token")


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_comes_from_the_environment(
    s3: S3, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "eu-central-1")
    Storage(s3.new_root()).put_new("a", b"x")
    assert "/eu-central-1/s3/aws4_request" in header(s3, "authorization")


def test_a_session_token_is_sent(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    Storage(s3.new_root()).put_new("a", b"x")
    assert header(s3, "x-amz-security-token") == "a-token"


def test_the_endpoint_of_s3_alone_is_used(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.proxy.url)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert Storage(s3.new_root()).put_new("a", b"x")
    assert s3.proxy.count("PUT") == 1


@pytest.mark.parametrize(
    "root",
    [
        "s3://user:hush@bucket/prefix",
        "s3://hush@bucket/prefix",
        "s3://bucket/prefix?secret=hush",
        "s3://bucket/prefix#hush",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(root: str) -> None:
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as refused:
        Storage(root)
    assert "hush" not in str(refused.value)


def test_an_endpoint_with_a_secret_is_refused_and_not_repeated(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url.replace("//", "//user:hush@"))
    with pytest.raises(ConfigError, match="the endpoint") as refused:
        Storage(s3.new_root()).get("a")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("root", ["nonsense://bucket/x", "az://container/x", "s3:///x"])
def test_an_address_that_means_nothing_is_a_clear_error(root: str) -> None:
    with pytest.raises(StorageError, match=re.escape(f"{root}/a: expected to read it")):
        Storage(root).get("a")


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    storage = Storage("s3://nowhere/x", **QUICKLY)
    with pytest.raises(StorageError, match=r"nowhere/x/a: expected to write.*NoSuchBucket"):
        storage.put_new("a", b"x")
    with pytest.raises(StorageError, match=r"nowhere/x/a: expected to read.*NoSuchBucket"):
        storage.list("a")
    with pytest.raises(MissingError):
        storage.get("a")


# requests


def test_what_each_call_costs(s3: S3, storage: Storage) -> None:
    calls: list[tuple[Callable[[], object], int]] = [
        (lambda: storage.get("a/b"), 1),
        (lambda: storage.size("a/b"), 1),
        (lambda: storage.list("a"), 1),
        (lambda: storage.put_new("a/c", b"x"), 1),
        (lambda: storage.put_new("a/c", b"x"), 2),
        (lambda: storage.put("a/c", b"x"), 1),
        (lambda: storage.delete("a/c"), 1),
        (lambda: storage.now(), 2),
        (lambda: storage.get_ranges("a/b", [0, 4, 8], [2, 2, 2]), 1),
        (lambda: storage.get_ranges("a/b", [0, 4, 8], [2, 2, 2], 10), 1),
        (lambda: storage.get_ranges("a/b", [3], [0], 10), 0),
        (lambda: storage.get_many(["a/b"] * 5), 5),
    ]
    for number, (call, cost) in enumerate(calls):
        s3.proxy.behave()
        call()
        assert s3.proxy.count() == cost, number


def test_ranges_far_apart_are_asked_for_at_once(s3: S3) -> None:
    storage = Storage(s3.new_root(), **QUICKLY)
    step = GAP_BYTES + 200
    data = os.urandom(3 * step)
    storage.put_new("a", data)
    s3.proxy.behave()
    starts, lengths = [2 * step, 0, 10, step], [100, 10, 5, 100]
    parts = storage.get_ranges("a", starts, lengths, len(data))
    assert parts == [data[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert sorted(request.headers["range"] for request in s3.proxy.requests) == [
        "bytes=0-14",
        f"bytes={step}-{step + 99}",
        f"bytes={2 * step}-{2 * step + 99}",
    ]


@pytest.mark.parametrize(
    ("size", "cost"), [(0, 2), (1, 1), (1000, 1), (1001, 2), (2000, 2), (7300, 8)]
)
def test_a_large_object_comes_in_pieces(
    s3: S3, monkeypatch: pytest.MonkeyPatch, size: int, cost: int
) -> None:
    monkeypatch.setattr(remote_objects, "GET_BYTES", 1000)
    storage, data = Storage(s3.new_root(), **QUICKLY), os.urandom(size)
    storage.put_new("a", data)
    s3.proxy.behave()
    assert storage.get("a", size) == data
    assert s3.proxy.count() == cost


def test_an_object_that_is_too_large_costs_one_request(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "GET_BYTES", 1000)
    storage = Storage(s3.new_root(), **QUICKLY)
    storage.put_new("a", bytes(5000))
    s3.proxy.behave()
    with pytest.raises(CorruptError, match="/a: expected at most 4999 bytes; got 5000 bytes"):
        storage.get("a", 4999)
    assert s3.proxy.count() == 1


def test_a_scorer_and_a_reader_need_no_right_to_delete(s3: S3, storage: Storage) -> None:
    for method in ("DELETE", "POST"):
        s3.proxy.misbehave("deny", method, times=10**6)
    with pytest.raises(StorageError, match="AccessDenied"):
        storage.delete("a/b")
    before = storage.now()
    assert pin(storage, "run", ["1" * 32]).expires >= before
    first, second = Claims(storage), Claims(storage)
    assert first.take(PART)
    assert not second.take(PART)
    with first.renewed(PART):
        pass
    assert second.take(PART)


def test_a_listing_takes_a_request_for_every_thousand(s3: S3) -> None:
    storage = Storage(s3.new_root(), **QUICKLY)
    s3.fill(storage.root, "a", 2001)
    s3.proxy.behave()
    assert len(storage.list("a")) == 2001
    assert s3.proxy.count() == 3


# faults


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("kind", [*BEFORE, *AFTER, "truncate"])
def test_a_read_that_fails_is_repeated(s3: S3, storage: Storage, call: str, kind: Kind) -> None:
    s3.proxy.misbehave(kind, times=3)
    assert READS[call](storage) == FOUND[call]
    answers_have_no_body = call == "size" and kind == "truncate"
    assert s3.proxy.count() == (1 if answers_have_no_body else 4)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_stores_are_asked_again(s3: S3, storage: Storage, status: int) -> None:
    s3.proxy.misbehave("refuse", times=2, status=status)
    assert storage.get("a/b") == b"0123456789"
    s3.proxy.misbehave("refuse", times=2, status=status)
    assert storage.put_new("a/c", b"x")
    assert s3.proxy.count() == 6


@pytest.mark.parametrize("call", READS)
def test_a_stalled_read_is_repeated(s3: S3, storage: Storage, call: str) -> None:
    s3.proxy.misbehave("stall")
    assert READS[call](Storage(storage.root, **SOON)) == FOUND[call]
    assert s3.proxy.count() == 2


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("kind", ["refuse", "drop", "truncate"])
def test_a_read_that_always_fails_is_a_clear_error(
    s3: S3, storage: Storage, call: str, kind: Kind
) -> None:
    if call == "size" and kind == "truncate":
        kind = "drop"
    s3.proxy.misbehave(kind, times=10**6)
    with pytest.raises(StorageError) as failed:
        READS[call](storage)
    assert failed.value.where.startswith(f"{storage.root}/a")
    assert failed.value.got
    assert "\n" not in str(failed.value)
    assert s3.proxy.count() <= 2 * (1 + remote_objects.RETRIES)
    s3.proxy.behave()
    assert READS[call](storage) == FOUND[call]


@pytest.mark.parametrize("kind", BEFORE)
def test_a_put_that_did_not_take_effect_is_repeated(s3: S3, storage: Storage, kind: Kind) -> None:
    s3.proxy.misbehave(kind, "PUT", times=3)
    assert storage.put_new("a/c", b"x")
    assert storage.get("a/c") == b"x"


@pytest.mark.parametrize("kind", AFTER)
def test_a_put_whose_reply_is_lost_took_effect_once(s3: S3, storage: Storage, kind: Kind) -> None:
    s3.proxy.misbehave(kind, "PUT")
    storage.put_new("a/c", b"x")
    assert not storage.put_new("a/c", b"another")
    assert storage.get("a/c") == b"x"


def test_a_put_that_meets_another_is_tried_again(
    s3: S3, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_objects, "CONFLICT_S", 0.0)
    s3.proxy.misbehave("refuse", "PUT", times=2, status=409)
    assert storage.put_new("a/c", b"x")
    s3.proxy.misbehave("refuse", "PUT", times=1, status=409)
    assert not storage.put_new("a/c", b"y")
    assert storage.get("a/c") == b"x"
    s3.proxy.misbehave("refuse", "PUT", times=10**6, status=409)
    with pytest.raises(StorageError, match=r"a/d: expected to write it; got .*409"):
        storage.put_new("a/d", b"x")


@pytest.mark.parametrize("kind", [*BEFORE, *AFTER])
def test_an_overwriting_put_is_repeated(s3: S3, storage: Storage, kind: Kind) -> None:
    s3.proxy.misbehave(kind, "PUT", times=3)
    storage.put("a/b", b"another")
    assert storage.get("a/b") == b"another"


@pytest.mark.parametrize("kind", [*BEFORE, *AFTER])
def test_a_delete_is_repeated(s3: S3, storage: Storage, kind: Kind) -> None:
    s3.proxy.misbehave(kind, part="a%2Fb", times=2)
    s3.proxy.misbehave(kind, "DELETE", times=2)
    storage.delete("a/b")
    assert storage.list("a") == []


@pytest.mark.parametrize(
    ("kind", "times"),
    [*((kind, times) for kind in [*BEFORE, *AFTER] for times in (1, 12, 25)), ("stall", 2)],
)
def test_a_commit_knows_whether_it_won(
    s3: S3, monkeypatch: pytest.MonkeyPatch, kind: Kind, times: int
) -> None:
    """Whatever becomes of the first puts, within obstore's retries or beyond them."""
    monkeypatch.setattr(commits, "BACKOFF_S", 0.0)
    options: dict[str, Any] = SOON if kind == "stall" else QUICKLY
    storage, commit = Storage(s3.new_root(), **options), make_commit()
    path = commit_path(commit.part, commit.n)
    s3.proxy.misbehave(kind, "PUT", "commits/", times=times)
    assert put_commit(storage, commit)
    assert read_commit(storage, path) == commit
    s3.proxy.behave()
    s3.proxy.misbehave(kind, "PUT", "commits/", times=times)
    assert not put_commit(storage, make_commit(attempt="b" * 32))
    assert read_commit(storage, path) == commit


def test_a_commit_that_never_gets_through_is_a_clear_error_and_loses_nothing(
    s3: S3, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "BACKOFF_S", 0.0)
    s3.proxy.misbehave("refuse", "PUT", "commits/", times=10**6, status=503)
    with pytest.raises(StorageError, match=r"commits/.*\.0\.json: expected to write it; got .*503"):
        put_commit(storage, make_commit())
    assert s3.proxy.count("PUT") == commits.RETRIES * (1 + remote_objects.RETRIES)
    s3.proxy.behave()
    assert storage.list("commits") == []
    assert storage.get("a/b") == b"0123456789"
    assert put_commit(storage, make_commit())


def test_a_truncated_object_is_damaged_and_costs_no_look(s3: S3, storage: Storage) -> None:
    with pytest.raises(CorruptError, match="a/b: expected an object of 20 bytes; got 10 bytes"):
        storage.get_ranges("a/b", [5], [15], 20)
    assert s3.proxy.count() == 1
    with pytest.raises(CorruptError, match="a/b: expected an object of 20 bytes; got 10 bytes"):
        storage.get_ranges("a/b", [12], [3], 20)


def test_an_error_says_the_stores_own_reason(s3: S3, storage: Storage) -> None:
    s3.proxy.misbehave("deny", "GET")
    with pytest.raises(StorageError, match="AccessDenied: Not you") as denied:
        storage.get("a/b")
    assert SECRET not in str(denied.value)
    assert s3.proxy.count() == 1


def test_a_store_that_ignores_conditions_is_refused_at_the_probe(s3: S3) -> None:
    s3.proxy.ignores_conditions = True
    storage = Storage(s3.new_root(), **QUICKLY)
    with pytest.raises(StorageError, match="a second put of the same key to be refused"):
        storage.probe()


def test_a_large_put_may_take_longer(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    connect = remote_objects.RemoteObjects._connect

    def recorded(self: remote_objects.RemoteObjects, limit_s: float) -> Any:
        limits.append(limit_s)
        return connect(self, limit_s)

    monkeypatch.setattr(remote_objects.RemoteObjects, "_connect", recorded)
    monkeypatch.setattr(remote_objects, "SLOWEST_BYTES_S", 100)
    storage = Storage(s3.new_root(), **QUICKLY)
    for size in (10, 2000, 2001, 9000, 9000, 10):
        storage.put(f"a/{size}", bytes(size))
    storage.get("a/9000")
    assert limits == [20, 40, 160]
