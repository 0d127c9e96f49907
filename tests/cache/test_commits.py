"""Commits: one attempt wins, whatever the storage answers."""

import base64
import errno
import json
import os
import tracemalloc
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache import commits, jsonfile
from stillroom.cache.commits import (
    Commit,
    commit_path,
    decode_commit,
    encode_row_table,
    list_commits,
    put_commit,
    read_commit,
)
from stillroom.cache.errors import CorruptError, InputError, MissingError, StorageError
from stillroom.cache.part import part_name
from stillroom.cache.quarantine import next_n, quarantine_path
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from tests.cache.conftest import QUICK
from tests.cache.fakes import (
    SCORED_BY,
    LostReply,
    commit_shard,
    make_identity,
    make_meta,
    random_arrays,
)

PART = part_name(3, "0123456789abcdef")
PATH = "commits/v000003/v000003-0123456789abcdef.0.json"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "BACKOFF_S", 0.0)


def make_commit(**changes: Any) -> Commit:
    """A commit of three rows."""
    table = encode_row_table(np.array([5, 6, 7]), np.array([2, 2, 2]), np.array([3, 4, 1]))
    fields: dict[str, Any] = {
        "part": PART,
        "n": 0,
        "attempt": "a" * 32,
        "identity": "1" * 32,
        "manifest_hash": "2" * 32,
        "rollouts_hash": "3" * 32,
        "rows": 3,
        "positions": 8,
        "tokens": 18,
        "teacher_prompt_tokens": 0,
        "stored_bytes": 100,
        "teacher_s": 1.5,
        "scorer": {"host": "h"},
        "row_table": table,
    }
    return Commit(**fields | changes)


def test_a_commit_round_trips(tmp_path: Path) -> None:
    storage, commit = Storage(tmp_path), make_commit()
    assert put_commit(storage, commit)
    assert read_commit(storage, PATH) == commit
    assert commit.policy_version == 3
    assert list_commits(storage) == {PART: 0}


def test_the_hash_of_a_commit_is_pinned() -> None:
    assert make_commit(row_table="AAAA").digest() == "82baf3b24ffe1845773f9956f8a94cb1"


def test_of_two_attempts_one_wins_quietly_and_both_stay(cache: Cache) -> None:
    arrays = random_arrays(0, 20, 3)
    winner = cache.add_shard(make_meta(), "0" * 32, arrays, SCORED_BY)
    loser = cache.add_shard(make_meta(), "0" * 32, arrays, SCORED_BY)
    assert winner is not None
    assert loser is None
    assert cache.commit_of(make_meta().name) == winner
    attempts = {entry.path.split("/")[2] for entry in cache.storage.list("scores")}
    assert len(attempts) == 2
    assert len(cache.storage.list("scores")) == 4
    assert winner.attempt in attempts


@pytest.mark.parametrize("reply", ["error", "exists"])
def test_a_lost_reply_to_our_own_commit_is_won(tmp_path: Path, reply: str) -> None:
    storage = LostReply(tmp_path, "commits", reply)
    assert put_commit(storage, make_commit())
    assert storage.puts == [PATH]


@pytest.mark.parametrize("reply", ["error", "exists"])
def test_a_lost_reply_to_anothers_commit_is_lost(tmp_path: Path, reply: str) -> None:
    storage = LostReply(tmp_path, "commits", reply)
    assert put_commit(Storage(tmp_path), make_commit(attempt="b" * 32))
    assert not put_commit(storage, make_commit())
    assert read_commit(storage, PATH).attempt == "b" * 32


def test_a_shard_is_committed_when_every_reply_is_lost(tmp_path: Path) -> None:
    Cache.create(tmp_path, make_identity())
    cache = Cache(LostReply(tmp_path, "commits", "error"), make_identity())
    arrays = random_arrays(0, 20, 3)
    commit = commit_shard(cache, arrays)
    assert cache.shard(commit).read("token").tolist() == arrays["token"].tolist()


@pytest.mark.parametrize("failures", [1, 2, 1000])
def test_a_commit_that_is_not_durable_is_not_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """The fsync of its folder fails, once or always, after the commit was linked."""
    fsync, folder, left = os.fsync, (tmp_path / PATH).parent, [failures]

    def failing(handle: int) -> None:
        if (tmp_path / PATH).exists() and os.path.samestat(os.fstat(handle), folder.stat()):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    if failures < 1000:
        assert put_commit(Storage(tmp_path), make_commit())
        assert left[0] < 0, "the folder was made durable after the failures"
    else:
        with pytest.raises(StorageError, match="Input/output error"):
            put_commit(Storage(tmp_path), make_commit())
    assert read_commit(Storage(tmp_path), PATH) == make_commit()


@settings(QUICK, max_examples=30)
@given(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4)))
def test_listing_and_asking_agree_on_the_live_commit(numbers: set[int], aside: set[int]) -> None:
    with TemporaryDirectory() as folder:
        storage = Storage(folder)
        for n in numbers:
            storage.put(commit_path(PART, n), b"{}")
        for n in aside:
            storage.put(quarantine_path(PART, n), b"{}")
        n = next_n(storage, PART)
        assert list_commits(storage) == ({PART: n} if n in numbers else {})


def test_an_absent_commit_is_tried_again(tmp_path: Path) -> None:
    storage = LostReply(tmp_path, "commits", "error", effective=False)

    class Recovering(LostReply):
        def put_new(self, path: str, data: bytes) -> bool:
            self.effective = len(self.puts) >= 2
            return super().put_new(path, data)

    with pytest.raises(StorageError, match="a reply"):
        put_commit(storage, make_commit())
    assert storage.puts == [PATH] * commits.RETRIES
    recovering = Recovering(tmp_path, "commits", "error")
    assert put_commit(recovering, make_commit())
    assert recovering.puts == [PATH] * 3


def test_a_storage_that_says_exists_and_has_nothing_is_an_error(tmp_path: Path) -> None:
    storage = LostReply(tmp_path, "commits", "exists", effective=False)
    with pytest.raises(StorageError, match="a commit after it was put; got none"):
        put_commit(storage, make_commit())


class Unreadable(LostReply):
    """A storage that takes commits and cannot be read."""

    def get(self, path: str, max_bytes: int | None = None) -> bytes:
        """Fail."""
        raise StorageError(self.describe(path), "to read it", "a time-out", "Try again.")


@pytest.mark.parametrize("reply", ["error", "exists"])
def test_an_unreadable_commit_is_unknown_and_nothing_is_deleted(tmp_path: Path, reply: str) -> None:
    storage = Unreadable(tmp_path, "commits", reply)
    with pytest.raises(StorageError):
        put_commit(storage, make_commit())
    assert (tmp_path / PATH).read_bytes() == make_commit().to_json()


def test_a_scorer_that_cannot_read_its_commit_back_leaves_its_attempt(tmp_path: Path) -> None:
    Cache.create(tmp_path, make_identity())
    cache = Cache(Unreadable(tmp_path, "commits", "error"), make_identity())
    with pytest.raises(StorageError):
        cache.add_shard(make_meta(), "0" * 32, random_arrays(0, 20, 3), SCORED_BY)
    reopened = Cache.open(tmp_path)
    assert len(reopened.storage.list("scores")) == 2
    commit = reopened.commit_of(make_meta().name)
    assert reopened.shard(commit).all_rows()["token"].size == commit.tokens


def test_a_quarantined_commit_is_not_live_and_the_next_has_n_plus_1(cache: Cache) -> None:
    arrays, name = random_arrays(0, 20, 3), make_meta().name
    for n in range(3):
        commit = commit_shard(cache, arrays)
        assert commit.n == n
        assert cache.commits() == {name: n}
        cache.storage.put_new(f"quarantine/{name}.{n}.json", b"{}")
        assert cache.commits() == {}
        with pytest.raises(MissingError, match=name):
            cache.commit_of(name)
    assert len(cache.storage.list("commits")) == 3
    assert len(cache.storage.list("scores")) == 6


def test_quarantine_of_another_part_changes_nothing(cache: Cache) -> None:
    first, second = make_meta(1), make_meta(17)
    commit_shard(cache, random_arrays(0, 20, 3), 1)
    cache.storage.put_new(f"quarantine/{second.name}.0.json", b"{}")
    assert cache.commits() == {first.name: 0}
    assert commit_shard(cache, random_arrays(0, 20, 3), 17).n == 1


def test_other_names_among_the_commits_are_ignored(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    put_commit(storage, make_commit())
    others = [f"{PART}.json", f"{PART}.x.json", "v3-0123456789abcdef.0.json", f"{PART}.0.jso"]
    others += [f"{PART}.01.json", f"{PART}.9999999999.json", f"old/{PART}.5.json"]
    for name in others:
        storage.put_new(f"commits/v000003/{name}", b"{}")
    storage.put_new(f"commits/v000004/{PART}.7.json", b"{}")
    assert list_commits(storage) == {PART: 0}


def test_paths_are_made_from_the_part() -> None:
    assert commit_path(PART, 0) == PATH
    assert commit_path(part_name(1_234_567, "0" * 16), 12).startswith("commits/v1234567/")
    for name in ("../x", "v000003-0123", "v000003-0123456789ABCDEF", PART + "\n"):
        with pytest.raises(InputError):
            commit_path(name, 0)


CHANGES: list[dict[str, Any]] = [
    {"format_version": 2},
    {"format_version": "1"},
    {"attempt": "../../../etc"},
    {"attempt": "A" * 32},
    {"attempt": 5},
    {"part": "v000003-fedcba9876543210"},
    {"part": "../x"},
    {"part": None},
    {"n": 1},
    {"n": "0"},
    {"rows": -1},
    {"rows": "3"},
    {"rows": 3.0},
    {"rows": True},
    {"rows": 9},
    {"rows": 10**12, "positions": 10**13, "tokens": 10**14},
    {"positions": None},
    {"positions": 16},
    {"tokens": 10},
    {"tokens": 2**60},
    {"tokens": -(10**30)},
    {"teacher_prompt_tokens": -1},
    {"stored_bytes": 2**60},
    {"teacher_s": -0.5},
    {"teacher_s": 10**400},
    {"teacher_s": True},
    {"scorer": []},
    {"scorer": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
    {"identity": "i" * 32},
    {"manifest_hash": "2" * 33},
    {"rollouts_hash": "3" * 32 + "\n"},
    {"row_table": 3},
    {"row_table": "\ud800"},
    {"other": 1},
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_commit_of_that_name_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    storage = Storage(tmp_path)
    storage.put_new(PATH, jsonfile.dump_sealed(asdict(make_commit()) | change))
    with pytest.raises(CorruptError, match=PATH):
        read_commit(storage, PATH)


def sealed(body: bytes) -> bytes:
    """An object that lacks its end, with the right hash of it."""
    return body + f',"xxh3_128":"{jsonfile.digest(body)}"}}'.encode()


def test_other_bytes_of_the_same_values_are_refused() -> None:
    data = make_commit().to_json()
    body = data.rpartition(b',"xxh3_128"')[0]
    assert decode_commit(sealed(body), PATH, "here") == make_commit()
    spaced = json.dumps(json.loads(body + b"}"), sort_keys=True).encode()[:-1]
    reordered = body.replace(b'"n":0,', b"") + b',"n":0'
    for other in (spaced, reordered, body.replace(b"1.5", b"1.50")):
        with pytest.raises(CorruptError, match=r"^here: expected canonical JSON"):
            decode_commit(sealed(other), PATH, "here")
    for other in (data + b"\n", sealed(body + b',"tokens":18')):
        with pytest.raises(CorruptError, match=r"^here: "):
            decode_commit(other, PATH, "here")


@settings(QUICK, max_examples=300)
@given(st.data())
def test_a_changed_byte_is_refused_or_makes_another_digest(data: st.DataObject) -> None:
    stored = bytearray(make_commit().to_json())
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != stored[at]))
    try:
        commit = decode_commit(bytes(stored), PATH, "here")
    except CorruptError:
        return
    assert commit.to_json() == stored
    assert commit.digest() != make_commit().digest()


def test_too_many_rows_are_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_ROWS", 2)
    with pytest.raises(InputError, match=r"at most 2 rows .* got 3 rows"):
        put_commit(Storage(tmp_path), make_commit())
    assert Storage(tmp_path).list("commits") == []


@pytest.mark.parametrize("field", sorted(asdict(make_commit())))
def test_a_commit_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    storage, value = Storage(tmp_path), asdict(make_commit())
    del value[field]
    storage.put_new(PATH, jsonfile.dump_sealed(value))
    with pytest.raises(CorruptError, match=field):
        read_commit(storage, PATH)


@QUICK
@given(st.lists(st.tuples(*[st.integers(0, 2**30)] * 3)))
def test_row_lengths_come_back(rows: list[tuple[int, int, int]]) -> None:
    prompt, positions, others = np.array(rows, np.uint32).reshape(-1, 3).T
    tokens = prompt + positions + others
    commit = make_commit(
        rows=len(rows),
        tokens=int(tokens.sum(dtype=np.int64)),
        positions=int(positions.sum(dtype=np.int64)),
        row_table=encode_row_table(tokens, prompt, positions),
    )
    lengths = commit.row_lengths()
    assert lengths.tolist() == np.stack([tokens, prompt, positions], axis=1).tolist()
    assert lengths.dtype == np.uint32


def test_a_row_with_fewer_tokens_than_it_must_have_is_not_packed() -> None:
    with pytest.raises(InputError, match="got 4 in row 1"):
        encode_row_table(np.array([5, 4]), np.array([2, 2]), np.array([3, 3]))


def test_row_lengths_of_a_shard(cache: Cache) -> None:
    arrays = random_arrays(0, 200, 30)
    lengths = commit_shard(cache, arrays).row_lengths()
    assert lengths[:, 0].tolist() == np.diff(arrays["sequence_start"]).tolist()
    assert lengths[:, 1].tolist() == arrays["prompt_length"].tolist()
    assert lengths[:, 2].tolist() == np.diff(arrays["position_start"]).tolist()


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"row_table": ""},
        {"row_table": "!"},
        {"row_table": "AAAA"},
        {"row_table": "é"},
        {"row_table": make_commit().row_table[:-8]},
        {"row_table": _packed(b"\0" * 35)},
        {"row_table": _packed(b"\0" * 36)},
        {"row_table": _packed(b"\0" * 37)},
        {"row_table": make_commit().row_table + "\n"},
        {"row_table": _packed(np.array([2**32 - 1, 0, 0] * 3, "<u4").tobytes()[:36]), "tokens": 0},
        {"rows": 2},
        {"rows": 4},
        {"rows": -1},
        {"tokens": 19},
        {"positions": 7},
    ],
)
def test_a_row_table_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=rf"^commit {PART}\.0, row table: expected -?\d+ rows"):
        replace(make_commit(), **changes).row_lengths()


def test_a_zip_bomb_is_not_unpacked() -> None:
    bomb = _packed(b"\0" * (20 << 20))
    with pytest.raises(CorruptError, match="got 37 bytes"):
        make_commit(row_table=bomb).row_lengths()


def test_a_small_table_of_many_rows_takes_no_gigabyte() -> None:
    rows = commits.MAX_ROWS
    table = _packed(np.repeat(np.array([1, 1, 0], "<u4"), rows).tobytes())
    commit = make_commit(rows=rows, tokens=2 * rows, positions=rows, row_table=table)
    tracemalloc.start()
    try:
        lengths = commit.row_lengths()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(lengths, np.broadcast_to(np.array([2, 1, 1]), (rows, 3)))
    assert peak < 48 * rows
