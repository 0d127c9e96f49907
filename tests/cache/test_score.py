"""The score job: every part once, with the right tokens, and nothing of a part that went wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillroom.cache.canary import LENGTHS
from stillroom.cache.claims import Claims, _Work
from stillroom.cache.errors import InputError, MismatchError, NumericsError
from stillroom.cache.schema import Arrays
from stillroom.cache.score import Scorer, score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec
from tests.cache.fakes import (
    TOPK,
    FakeTeacher,
    dense_scores,
    make_meta,
    make_rollout,
    make_table,
    random_rollouts,
    same_bits,
)


def add(cache: Cache, number: int, rows: list[dict[str, Any]] | None = None) -> str:
    """Add a part of given or of random rollouts; its name."""
    table = random_rollouts(number, 6) if rows is None else make_table(rows)
    assert cache.add_part(table, make_meta(number))
    return make_meta(number).name


def shard_of(cache: Cache, part: str) -> Arrays:
    """The columns of a part's shard."""
    return cache.shard(cache.commit_of(part)).all_rows()


def assert_scored(arrays: Arrays, before: list[int], at: list[int]) -> None:
    """The teacher's columns are those of the fake's table."""
    logit_PV = FakeTeacher().logit_VV[before]
    expected = dense_scores(logit_PV, np.array(at), TOPK)
    assert same_bits(arrays["topk_id"], expected.topk_id)
    assert same_bits(arrays["topk_logprob"], expected.topk_logprob)
    assert same_bits(arrays["tail_logprob"], expected.tail_logprob)
    assert same_bits(arrays["sampled_logprob"], expected.sampled_logprob)
    assert (arrays["topk_count"] == TOPK).all()


def test_every_part_is_scored_once(cache: Cache) -> None:
    parts, teacher = [add(cache, number) for number in (3, 1, 2)], FakeTeacher()
    assert cache.unscored() == sorted(parts)
    report = score(cache, teacher)
    assert sorted(report.scored) == sorted(parts)
    assert report.lost == []
    assert cache.unscored() == []
    commits = [cache.commit_of(part) for part in parts]
    assert report.positions == sum(commit.positions for commit in commits)
    assert report.teacher_s == pytest.approx(sum(commit.teacher_s for commit in commits))
    for part in parts:
        arrays = shard_of(cache, part)
        at = np.flatnonzero(arrays["scored"])
        token = arrays["token"]
        assert_scored(arrays, token[at - 1].tolist(), token[at].tolist())


def test_a_report_says_how_long_the_model_ran(cache: Cache) -> None:
    class Telling(FakeTeacher):
        def stats(self) -> dict[str, float]:
            return {"model_s": 0.25 * len(self.read)}

    add(cache, 1)
    add(cache, 2)
    report = score(cache, Telling())
    assert report.model_s == 0.25 * 12, "the canary is not among the parts"
    assert report.work_s >= report.teacher_s > 0
    add(cache, 3)
    assert score(cache, FakeTeacher()).model_s == 0


def test_a_teacher_that_stays_need_not_score_the_canary_again(cache: Cache) -> None:
    first = add(cache, 1)
    score(cache, FakeTeacher(), check_teacher=False)
    assert cache.is_scored(first)
    assert cache.storage.list("canary") == []
    add(cache, 2)
    score(cache, FakeTeacher())
    assert len(cache.storage.list("canary")) == 1


def test_a_rerun_reads_nothing(cache: Cache) -> None:
    add(cache, 1)
    score(cache, FakeTeacher())
    before = cache.storage.list("scores")
    teacher = FakeTeacher()
    report = score(cache, teacher)
    assert (report.scored, report.lost, report.positions, teacher.read) == ([], [], 0, [])
    assert cache.storage.list("scores") == before


def test_a_later_part_is_scored_alone(cache: Cache) -> None:
    add(cache, 1)
    score(cache, FakeTeacher())
    later = add(cache, 2)
    assert score(cache, FakeTeacher()).scored == [later]


def test_a_retired_part_is_not_scored(cache: Cache) -> None:
    first, second = add(cache, 1), add(cache, 2)
    cache.retire(first, "too old")
    assert score(cache, FakeTeacher()).scored == [second]


def test_a_quarantined_part_is_scored_again(cache: Cache) -> None:
    part = add(cache, 1)
    score(cache, FakeTeacher())
    cache.quarantine(part, "again", damaged=False)
    assert score(cache, FakeTeacher()).scored == [part]
    assert cache.commit_of(part).n == 1


def test_a_commit_says_who_scored_what(cache: Cache) -> None:
    part = add(cache, 1)
    score(cache, FakeTeacher(numeric_class="fake-9"))
    commit = cache.commit_of(part)
    assert commit.rollouts_hash == cache.read_part(part)[2]
    assert commit.identity == cache.identity.digest()
    assert commit.scorer.keys() == {"host", "pid", "numeric_class", "time"}
    assert commit.scorer["numeric_class"] == "fake-9"
    sizes = [e.size_bytes for e in cache.storage.list(f"scores/{part}/{commit.attempt}")]
    assert commit.stored_bytes == sum(sizes)
    assert commit.teacher_s >= 0


def test_every_row_of_the_teacher_is_a_step_that_keeps_the_claim(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part may take hours, if its rows come."""
    part, rows = add(cache, 1), 6
    seen: list[int] = []

    class Slow(FakeTeacher):
        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            for answer in super().score(rows, spec):
                seen.append(len(steps))
                yield answer

    steps: list[_Work] = []
    monkeypatch.setattr(_Work, "progress", lambda self: steps.append(self))
    assert score(cache, Slow()).scored == [part]
    assert len({id(work) for work in steps}) == 1
    assert seen[-rows:] == list(range(rows))
    assert len(steps) == rows


@pytest.fixture
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers take parts by name, and in no order of their own."""
    monkeypatch.setattr(Claims, "in_own_order", lambda _, parts: sorted(parts))


class Overtaken(FakeTeacher):
    """A teacher that is so slow that another scorer, who sees no claims, does everything
    meanwhile."""

    def __init__(self, cache: Cache, *, when: int) -> None:
        """Let the other one run before the answer to the call of that number (0: the canary)."""
        super().__init__()
        self.cache, self.when, self.calls = cache, when, 0
        self.others: list[str] = []

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        if self.calls == self.when:
            for claim in self.cache.storage.list("claims"):
                self.cache.storage.delete(claim.path)
            self.others = score(self.cache, FakeTeacher()).scored
        self.calls += 1
        yield from super().score(rows, spec)


@pytest.mark.usefixtures("_in_order")
def test_the_second_of_two_scorers_loses_quietly(cache: Cache) -> None:
    parts = [add(cache, number) for number in (1, 2, 3)]
    slow = Overtaken(cache, when=2)
    report = score(cache, slow)
    assert report.scored == parts[:1]
    assert report.lost == parts[1:2]
    assert slow.others == parts[1:]
    assert slow.calls == 3, "a part that another scorer has done meanwhile is not begun"
    assert report.positions == cache.commit_of(parts[0]).positions
    assert set(cache.commits().values()) == {0}
    attempts = {tuple(e.path.split("/")[1:3]) for e in cache.storage.list("scores")}
    assert sorted(part for part, _ in attempts) == [parts[0], parts[1], parts[1], parts[2]]
    assert cache.snapshot().rows == 18


def test_a_scorer_overtaken_at_the_start_does_nothing(cache: Cache) -> None:
    parts = [add(cache, number) for number in (1, 2)]
    report = score(cache, Overtaken(cache, when=0))
    assert (report.scored, report.lost) == ([], [])
    assert cache.commits().keys() == set(parts)


def test_the_teacher_reads_its_own_prompt_where_it_has_one(cache: Cache) -> None:
    rows = [
        make_rollout(prompt=[1, 2, 3], completion=[4, 5, 6], teacher_prompt=[7, 8, 9, 10, 11]),
        make_rollout(prompt=[1, 2, 3], completion=[4, 5, 6]),
        make_rollout(prompt=[1, 2, 3], completion=[12, 13], teacher_prompt=[14]),
        make_rollout(prompt=[20], completion=[21, 22], teacher_prompt=[]),
    ]
    part, teacher = add(cache, 1, rows), FakeTeacher()
    score(cache, teacher)
    assert sorted(teacher.read[-4:]) == [
        [1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 4, 5, 6],
        [14, 12, 13],
        [20, 21, 22],
    ]
    arrays = shard_of(cache, part)
    before = [11, 4, 5, 3, 4, 5, 14, 12, 20, 21]
    assert_scored(arrays, before, [4, 5, 6, 4, 5, 6, 12, 13, 21, 22])
    assert arrays["token"][:6].tolist() == [1, 2, 3, 4, 5, 6], "what the student read stays"


def test_a_scored_mask_with_gaps_leaves_positions_out(cache: Cache) -> None:
    rows = [
        make_rollout(prompt=[1, 2], completion=[3, 4, 5, 6], scored=[0, 1, 0, 1]),
        make_rollout(prompt=[7], completion=[8, 9], scored=[1, 0], teacher_prompt=[10, 11]),
        make_rollout(prompt=[12], completion=[13, 14], scored=[0, 1]),
    ]
    part, teacher = add(cache, 1, rows), FakeTeacher()
    score(cache, teacher)
    assert [1, 2, 3, 4, 5, 6] in teacher.read, "unscored tokens are read all the same"
    arrays = shard_of(cache, part)
    assert arrays["position_start"].tolist() == [0, 2, 3, 4]
    assert_scored(arrays, [3, 5, 11, 13], [4, 6, 8, 14])
    assert cache.commit_of(part).row_lengths()[:, 2].tolist() == [2, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_ids_are_exact_from_part_to_shard(cache: Cache, seed: int) -> None:
    part = add(cache, seed)
    score(cache, FakeTeacher())
    table, _, _ = cache.read_part(part)
    pairs = zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True)
    assert shard_of(cache, part)["token"].tolist() == [i for p, c in pairs for i in p + c]


def test_temperature_and_k_are_the_identitys(cache: Cache) -> None:
    asked: list[ScoreSpec] = []

    class Asked(FakeTeacher):
        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            asked.append(spec)
            yield from super().score(rows, spec)

    add(cache, 1)
    score(cache, Asked())
    assert asked == [ScoreSpec(topk=TOPK)] * 2


class Failing(FakeTeacher):
    """A teacher that fails at the rows of one part."""

    def __init__(self, error: Exception, token: int) -> None:
        """Fail where a row holds the token."""
        super().__init__()
        self.error, self.token = error, token

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        for index, scores in super().score(rows, spec):
            if len(rows[index].token) == 2 and rows[index].token[0] == self.token:
                raise self.error
            yield index, scores


@pytest.mark.usefixtures("_in_order")
@pytest.mark.parametrize("cls", [NumericsError, InputError])
def test_an_error_of_the_teacher_names_the_part_and_commits_nothing_of_it(
    cache: Cache, cls: type[NumericsError | InputError]
) -> None:
    good = add(cache, 1, [make_rollout()])
    bad = add(cache, 2, [make_rollout(), make_rollout(prompt=[39], completion=[1])])
    teacher = Failing(cls("row 1", "finite teacher logits", "nan", "Do."), token=39)
    with pytest.raises(cls, match=f"^{bad}, row 1: expected finite teacher logits; got nan"):
        score(cache, teacher)
    assert cache.commits().keys() == {good}
    assert {e.path.split("/")[1] for e in cache.storage.list("scores")} == {good}
    assert score(cache, FakeTeacher()).scored == [bad]


@pytest.mark.usefixtures("_in_order")
def test_parts_that_fail_come_last(cache: Cache) -> None:
    bad = [add(cache, n, [make_rollout(prompt=[39], completion=[1])]) for n in (1, 2)]
    damaged, good = add(cache, 3), [add(cache, n) for n in (4, 5)]
    path = cache.storage.folder / f"rollouts/{damaged}.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    teacher = Failing(NumericsError("row 0", "finite logits", "nan", "Do."), token=39)
    with pytest.raises(NumericsError, match=f"^{bad[0]}, row 0: .* In all 3 parts cannot be"):
        score(cache, teacher)
    assert sorted(cache.commits()) == good
    assert not any(Claims(cache.storage).is_held(part) for part in cache.parts())


class Shifted(FakeTeacher):
    """A teacher that scores each sampled token as another one, outside of the canary."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        for index, scores in super().score(rows, spec):
            own = scores.sampled_logprob
            wrong = own if len(rows) == len(LENGTHS) else np.full_like(own, -1e-3)
            yield index, replace(scores, sampled_logprob=wrong)


def test_an_engine_that_answers_for_other_tokens_ends_the_job(cache: Cache) -> None:
    """It would do so for every part."""
    for number in (1, 2):
        add(cache, number)
    scorer = Scorer(cache, Shifted())
    with pytest.raises(MismatchError, match="answered for other tokens"):
        scorer.score(cache.unscored())
    assert (scorer.failed, cache.commits()) == ({}, {})


def test_a_part_that_failed_keeps_nothing_in_memory(cache: Cache) -> None:
    bad = add(cache, 1, [make_rollout(prompt=[39], completion=[1])])
    scorer = Scorer(cache, Failing(NumericsError("row 0", "finite logits", "nan", "Do."), 39))
    assert scorer.score_free([bad]) == []
    error = scorer.failed[bad]
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_the_canary_that_fails_is_no_part_that_fails(cache: Cache) -> None:
    add(cache, 1)
    calls: list[int] = []

    class Nowhere(FakeTeacher):
        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            calls.append(len(rows))
            raise NumericsError("row 0", "finite logits", "nan", "Do.")

    with pytest.raises(NumericsError, match=r"^row 0: expected finite logits; got nan\. Do\.$"):
        score(cache, Nowhere())
    assert len(calls) == 1


def test_another_teacher_fills_nothing(cache: Cache) -> None:
    add(cache, 1)
    score(cache, FakeTeacher())
    later = add(cache, 2)
    with pytest.raises(MismatchError):
        score(cache, FakeTeacher(seed=1))
    assert cache.unscored() == [later]
