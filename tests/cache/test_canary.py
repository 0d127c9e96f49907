"""The canary: the same teacher passes, another one is refused, a new engine asks first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.canary import NEW_CLASS, SAME_CLASS, Difference, canary_rows, check_canary
from stillroom.cache.errors import CorruptError, MismatchError
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import (
    VOCAB,
    FakeTeacher,
    LostReply,
    make_identity,
    make_meta,
    random_rollouts,
)

PATH = "canary/fake-1-float32-cpu.json"
NEW = "fake-2-bfloat16-cuda"


def test_the_first_teacher_lays_it_down(cache: Cache) -> None:
    assert check_canary(cache, FakeTeacher()) is None
    assert [entry.path for entry in cache.storage.list("canary")] == [PATH]


def test_the_same_class_passes(cache: Cache, root: Path) -> None:
    check_canary(cache, FakeTeacher())
    before = (root / PATH).read_bytes()
    assert check_canary(cache, FakeTeacher()) == Difference(0.0, 0.0)
    near = check_canary(cache, FakeTeacher(noise=0.003))
    assert near is not None
    assert 0 < near.sampled_nats < SAME_CLASS[0]
    assert 0 < near.kl_nats < SAME_CLASS[1]
    assert (root / PATH).read_bytes() == before


@pytest.mark.parametrize(
    "teacher", [FakeTeacher(noise=0.05), FakeTeacher(noise=1.0), FakeTeacher(seed=1)]
)
def test_other_weights_are_refused(cache: Cache, teacher: FakeTeacher) -> None:
    check_canary(cache, FakeTeacher())
    for accept in (False, True):
        with pytest.raises(MismatchError, match=rf"{PATH}: expected logprobs within 0\.01 nats"):
            check_canary(cache, teacher, accept_numerics=accept)


def test_one_changed_row_of_weights_is_refused(cache: Cache) -> None:
    check_canary(cache, FakeTeacher())
    teacher = FakeTeacher()
    teacher.logit_VV[:, 5] = 0
    with pytest.raises(MismatchError):
        check_canary(cache, teacher)


def test_nan_is_refused(cache: Cache) -> None:
    check_canary(cache, FakeTeacher())
    teacher = FakeTeacher()
    teacher.logit_VV[3] = np.nan
    with pytest.raises(MismatchError):
        check_canary(cache, teacher)


def test_a_new_class_asks_first(cache: Cache) -> None:
    check_canary(cache, FakeTeacher())
    teacher = FakeTeacher(noise=0.03, numeric_class=NEW)
    with pytest.raises(MismatchError, match=rf"{NEW}.json: .*--accept-numerics"):
        check_canary(cache, teacher)
    assert len(cache.storage.list("canary")) == 1
    difference = check_canary(cache, teacher, accept_numerics=True)
    assert difference is not None
    assert difference.within(NEW_CLASS)
    assert not difference.within(SAME_CLASS)
    assert len(cache.storage.list("canary")) == 2
    assert check_canary(cache, teacher) == Difference(0.0, 0.0)
    assert check_canary(cache, FakeTeacher()) == Difference(0.0, 0.0)


def test_a_new_class_that_is_far_off_is_refused_whatever_a_person_says(cache: Cache) -> None:
    check_canary(cache, FakeTeacher())
    teacher = FakeTeacher(noise=0.5, numeric_class=NEW)
    with pytest.raises(MismatchError, match=rf"{PATH}: .*from {NEW}"):
        check_canary(cache, teacher, accept_numerics=True)
    assert len(cache.storage.list("canary")) == 1


def test_a_third_class_is_compared_with_the_first(cache: Cache) -> None:
    """Classes may not wander off in small steps; the second's name comes before the first's."""
    check_canary(cache, FakeTeacher())
    second = FakeTeacher(noise=0.04, numeric_class="a")
    check_canary(cache, second, accept_numerics=True)
    third = FakeTeacher(numeric_class="b")
    assert check_canary(cache, third, accept_numerics=True) == Difference(0.0, 0.0)


def test_a_class_may_hold_any_characters(cache: Cache) -> None:
    check_canary(cache, FakeTeacher(numeric_class="vllm 0.32 (fp8)/cuda:0"))
    assert [e.path for e in cache.storage.list("canary")] == ["canary/vllm-0.32-fp8-cuda-0.json"]
    assert check_canary(cache, FakeTeacher(numeric_class="vllm 0.32 (fp8)/cuda:0")) is not None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"topk_id":1}'])
def test_a_damaged_file_is_refused(cache: Cache, root: Path, data: bytes) -> None:
    check_refused(cache, root, data)


@pytest.mark.parametrize(
    "value",
    [
        {"topk_id": 1},
        {"topk_id": [], "topk_logprob": [], "sampled_logprob": []},
        {"topk_id": [[1]], "topk_logprob": [[-1.0]], "sampled_logprob": ["a"]},
    ],
)
def test_a_file_without_usable_scores_is_refused(
    cache: Cache, root: Path, value: dict[str, Any]
) -> None:
    check_refused(cache, root, jsonfile.dump_sealed(value))


@pytest.mark.parametrize(
    "change",
    [
        {"order": "0"},
        {"order": None},
        {"more": 1},
        {"sampled_logprob": 1e300},
        {"sampled_logprob": -1e300},
        {"sampled_logprob": False},
        {"topk_id": -1},
        {"topk_id": 2**62},
    ],
)
def test_one_value_that_cannot_be_is_refused(
    cache: Cache, root: Path, change: dict[str, Any]
) -> None:
    """A list of numbers takes the new one in place of all of its own."""
    check_canary(cache, FakeTeacher())
    stored = jsonfile.load_sealed((root / PATH).read_bytes(), "x")
    for name, value in change.items():
        old = stored.get(name)
        stored[name] = np.full(np.shape(old), value).tolist() if isinstance(old, list) else value
    check_refused(cache, root, jsonfile.dump_sealed(stored))


def check_refused(cache: Cache, root: Path, data: bytes) -> None:
    """Other bytes in place of a canary are damage, for its own class and for a new one."""
    check_canary(cache, FakeTeacher())
    (root / PATH).write_bytes(data)
    with pytest.raises(CorruptError, match=PATH):
        check_canary(cache, FakeTeacher())
    with pytest.raises(CorruptError, match=PATH):
        check_canary(cache, FakeTeacher(numeric_class=NEW), accept_numerics=True)


def test_changed_numbers_are_refused(cache: Cache, root: Path) -> None:
    check_canary(cache, FakeTeacher())
    stored = jsonfile.load_sealed((root / PATH).read_bytes(), "x")
    stored["sampled_logprob"] = [value + 0.02 for value in stored["sampled_logprob"]]
    (root / PATH).write_bytes(jsonfile.dump_sealed(stored))
    with pytest.raises(MismatchError):
        check_canary(cache, FakeTeacher())


def test_of_two_first_teachers_the_later_is_compared(tmp_path: Path) -> None:
    Cache.create(tmp_path, make_identity())

    class Late(LostReply):
        """A storage in which another scorer lays the canary down first."""

        def put_new(self, path: str, data: bytes) -> bool:
            check_canary(Cache.open(tmp_path), FakeTeacher())
            return super().put_new(path, data)

    cache = Cache(Late(tmp_path, "commits", "error"), make_identity())
    with pytest.raises(MismatchError):
        check_canary(cache, FakeTeacher(seed=1))
    Path(tmp_path / PATH).unlink()
    assert check_canary(cache, FakeTeacher()) == Difference(0.0, 0.0)


def test_sequences_are_the_same_for_every_cache() -> None:
    rows, again = canary_rows(VOCAB, 1000), canary_rows(VOCAB, 1000)
    assert [row.token.tolist() for row in rows] == [row.token.tolist() for row in again]
    assert [len(row.token) for row in rows] == [2, 4, 8, 16, 32, 64, 96, 128]
    assert rows[1].token.tolist() == [35, 37, 2, 26]
    for row in rows:
        assert row.targets.tolist() == list(range(1, len(row.token)))
        assert row.token.max() < VOCAB


def test_sequences_are_no_longer_than_the_teacher_reads() -> None:
    assert max(len(row.token) for row in canary_rows(VOCAB, 20)) == 20


def test_a_teacher_that_fails_it_scores_nothing(cache: Cache) -> None:
    cache.add_part(random_rollouts(1, 3), make_meta(1))
    check_canary(cache, FakeTeacher())
    with pytest.raises(MismatchError):
        score(cache, FakeTeacher(noise=0.1))
    with pytest.raises(MismatchError):
        score(cache, FakeTeacher(numeric_class=NEW))
    assert cache.commits() == {}
    assert score(cache, FakeTeacher(numeric_class=NEW), accept_numerics=True).scored
