"""Rows that are longer than an engine reads: found before the first part is scored."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.mapped_teacher import MappedTeacher
from stillroom.cache.mixed_teacher import MixedTeacher
from stillroom.cache.part import decode_row_lengths
from stillroom.cache.row_lengths import RowLengths
from stillroom.cache.score import Scorer, score
from stillroom.cache.score_on_ray import _make_scorer
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, longest_row_of
from stillroom.cache.watch import watch
from tests.cache.fakes import FakeTeacher, make_meta, make_rollout, make_table
from tests.cache.test_mapped_teacher import make_map

LONGEST = 9


class Short(FakeTeacher):
    """A teacher with a short context."""

    longest_row = LONGEST

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """As `FakeTeacher`; the canary is read whatever its length."""
        if any(len(r.token) > LONGEST and (r.token[3:] == 4).all() for r in rows):
            raise InputError("row 0", "a shorter one", "a long one", "Shorten it.")
        yield from super().score(rows, spec)


def add(cache: Cache, number: int, *completions: int, **changes: Any) -> str:
    """Add a part with completions of so many tokens behind prompts of three; its name."""
    rows = [
        make_rollout(rollout_id=i, completion=[4] * n, **changes) for i, n in enumerate(completions)
    ]
    assert cache.add_part(make_table(rows), make_meta(number))
    return make_meta(number).name


def test_lengths_are_what_the_teacher_reads(cache: Cache) -> None:
    assert cache.row_lengths(add(cache, 1, 2, 5)).tolist() == [5, 8]
    assert cache.row_lengths(add(cache, 2, 2, teacher_prompt=[1] * 7)).tolist() == [9]
    path = f"rollouts/{make_meta(1).name}.parquet"
    data = bytearray(cache.storage.get(path))
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptError, match="here"):
        decode_row_lengths(bytes(data), "here")


def test_they_are_refused_before_anything_is_scored(cache: Cache) -> None:
    for number in range(4):
        add(cache, number, 2, LONGEST - 3)
    first, _ = add(cache, 4, 2, 7, 8), add(cache, 5, 7)
    teacher = Short()
    with pytest.raises(
        InputError, match=rf"at most {LONGEST} .* got 3 longer .* 2 parts, .* {first}"
    ):
        score(cache, teacher)
    assert teacher.read == []
    assert not cache.commits()
    assert not cache.storage.list("claims")


def test_their_parts_are_left_out(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = add(cache, 1, 2, LONGEST - 3), add(cache, 2, 7, 2)
    report = score(cache, Short(), too_long="skip")
    assert (report.scored, report.too_long) == ([good], [bad])
    assert cache.unscored() == [bad]
    assert f"1 parts are left out, such as {bad}: 1 rows have over {LONGEST} tokens" in (
        capsys.readouterr().err
    )
    assert score(cache, FakeTeacher()).scored == [bad]


def test_nothing_is_read_for_a_teacher_that_reads_all(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "row_lengths", lambda *_: pytest.fail("it was read"))
    most = cache.identity.max_length
    for longest in (None, most, most - 1):
        assert RowLengths(cache, longest).fitting(["a"]) == ["a"]
    with pytest.raises(ConfigError, match="too_long"):
        RowLengths(cache, 5, "cut")


def test_a_part_that_cannot_be_read_is_not_too_long(cache: Cache) -> None:
    assert RowLengths(cache, 5).fitting(["v000000-" + "0" * 16]) == ["v000000-" + "0" * 16]


def look(scorer: Scorer, monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    """Watch until all events have happened, one a pause."""

    def sleep(_: float) -> None:
        if not events:
            raise KeyboardInterrupt
        events.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        watch(scorer, 30.0)


def test_a_service_refuses_what_is_there_and_leaves_out_what_comes(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(cache, Short())
    look(scorer, monkeypatch, [lambda: add(cache, 1, 7), lambda: add(cache, 2, 2)])
    assert scorer.report.scored == [make_meta(2).name]
    assert list(scorer.failed) == [make_meta(1).name]
    with pytest.raises(InputError, match="1 longer ones"):
        watch(Scorer(cache, Short()), 30.0)
    scorer = Scorer(cache, Short(), too_long="skip")
    look(scorer, monkeypatch, [lambda: add(cache, 3, 8), lambda: add(cache, 4, 2)])
    assert scorer.report.scored == [make_meta(4).name]
    assert scorer.report.too_long == [make_meta(1).name, make_meta(3).name]
    assert not scorer.failed


def test_a_process_of_ray_does_likewise(cache: Cache) -> None:
    good, bad = add(cache, 1, 2), add(cache, 2, 7)
    make = partial(_make_scorer, cache.storage.root, lambda _: Short(), False)
    with pytest.raises(InputError, match="1 longer ones in 1 parts"):
        make("refuse", [good, bad])
    make("refuse", [good])  # a part that came since the job began is another job's
    do = make("skip", [good, bad])
    outcomes = [do(part, False) for part in (good, bad)]
    told = [(one["committed"], one["too_long"]) for one in outcomes if one is not None]
    assert told == [(True, False), (False, True)]


def test_teachers_of_teachers_tell_the_least() -> None:
    mixed = MixedTeacher([FakeTeacher(), Short()], [0.5, 0.5], 40)
    assert longest_row_of(mixed) == LONGEST
    assert longest_row_of(MappedTeacher(Short(), make_map(2))) == LONGEST
    assert longest_row_of(MixedTeacher([FakeTeacher()], [1.0], 40)) is None
