"""Mixtures of teachers of which only the likeliest tokens are known: never above the exact mixture,
and within the bounds of docs/several-teachers.md."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.agreement import check_agreement
from stillroom.cache.errors import ConfigError, NumericsError
from stillroom.cache.mixed_teacher import MixedTeacher, mix
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, stats_of
from tests.cache.fakes import VOCAB, FakeTeacher, dense_scores, log_softmax

HALF = 2.0**-10
"""Rounding of an entry to float16, twice, as a share of its logprob; nats."""


def distributions(seed: int, positions: int, vocab: int, spread: float) -> np.ndarray:
    """(positions, vocab) log probabilities."""
    return log_softmax(np.random.default_rng(seed).normal(0, spread, (positions, vocab)))


@given(
    seed=st.integers(0, 2**32),
    members=st.integers(2, 4),
    topk=st.integers(1, 12),
    more=st.integers(0, 12),
    spread=st.sampled_from([0.1, 1.0, 4.0, 9.0]),
    skew=st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold(
    seed: int, members: int, topk: int, more: int, spread: float, skew: float
) -> None:
    """Against the exact mixture of full distributions."""
    vocab, positions = 40, 6
    rng = np.random.default_rng(seed)
    weight = rng.random(members) + 0.05
    weight[0] *= skew
    share = weight / weight.sum()
    logprobs = [distributions(seed + i, positions, vocab, spread) for i in range(members)]
    sampled = rng.integers(0, vocab, positions).astype(np.uint32)
    listed = [dense_scores(one, sampled, topk + more) for one in logprobs]
    found = mix(listed, share.tolist(), sampled, ScoreSpec(topk=topk))
    exact = sum(w * np.exp(one) for w, one in zip(share, logprobs, strict=True))
    assert isinstance(exact, np.ndarray)
    for p in range(positions):
        ids, stored = found.topk_id[p], found.topk_logprob[p].astype(float)
        assert found.topk_count[p] == topk
        assert (ids < vocab).all()
        unlisted, missing, outside = np.zeros(topk), 0.0, 0.0
        for w, one, own in zip(share, logprobs, listed, strict=True):
            least = np.exp(np.sort(one[p])[-(topk + more)])
            tail = max(1 - np.exp(np.sort(one[p])[-(topk + more) :]).sum(), 0)
            absent = ~np.isin(ids, own.topk_id[p]) & (ids != sampled[p])
            unlisted += w * np.where(absent, min(least, tail), 0)
            missing += w * min(tail, absent.sum() * least)
            outside += w * min(least, tail)
        true = np.log(exact[p][ids])
        slack = HALF * np.maximum(1, -true) + 1e-3
        assert (stored <= true + slack).all()
        assert (true <= np.log(np.exp(stored) + unlisted) + slack).all()
        true_tail = max(1 - exact[p][ids].sum(), 0)
        stored_tail = np.exp(float(found.tail_logprob[p]))
        rounding = 4e-3
        assert true_tail - rounding <= stored_tail <= true_tail + missing + rounding
        others = np.setdiff1d(np.arange(vocab), ids)
        assert (exact[p][others] <= np.exp(stored.min()) * (1 + 2e-2) + outside + 1e-6).all()
        assert found.sampled_logprob[p] == pytest.approx(np.log(exact[p][sampled[p]]), abs=1e-5)
    agreeing = {f: getattr(found, f) for f in ("topk_id", "topk_logprob", "topk_count")}
    agreeing |= {"tail_logprob": found.tail_logprob, "sampled_logprob": found.sampled_logprob}
    check_agreement(agreeing | {"token": sampled, "scored": np.ones(positions, int)}, "part")


def test_the_whole_vocabulary_is_the_exact_mixture() -> None:
    share, sampled = [0.25, 0.75], np.arange(6, dtype=np.uint32)
    logprobs = [distributions(seed, 6, 20, 2.0) for seed in (1, 2)]
    listed = [dense_scores(one, sampled, 20) for one in logprobs]
    exact = np.logaddexp(*(np.log(w) + one for w, one in zip(share, logprobs, strict=True)))
    for topk, mass in ((20, 1.0), (4, 1.0), (20, 0.7)):
        expected = dense_scores(exact, sampled, topk, mass)
        found = mix(listed, share, sampled, ScoreSpec(topk=topk, mass=mass))
        assert (found.topk_count == expected.topk_count).all()
        np.testing.assert_allclose(
            np.exp(found.topk_logprob.astype(float)),
            np.exp(expected.topk_logprob.astype(float)),
            rtol=8e-3,
        )
        tail, expected_tail = (np.exp(s.tail_logprob.astype(float)) for s in (found, expected))
        np.testing.assert_allclose(tail, expected_tail, rtol=2e-2, atol=1e-3)
        np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=1e-5)


def test_a_sampled_token_that_nobody_lists_is_exact_and_leaves_the_tail() -> None:
    """Each lists one token; the second choice of both is more likely in the mixture."""
    first, second = (np.full((1, 6), 0.02) for _ in range(2))
    first[0, [0, 1, 5]] = 0.4, 0.2, 0.34
    second[0, [2, 3, 5]] = 0.4, 0.2, 0.34
    sampled = np.array([5], np.uint32)
    listed = [dense_scores(np.log(one), sampled, 1) for one in (first, second)]
    assert [one.topk_id.tolist() for one in listed] == [[[0]], [[2]]]
    found = mix(listed, [0.5, 0.5], sampled, ScoreSpec(topk=1))
    assert found.topk_id.tolist() == [[5]]
    assert found.sampled_logprob[0] == pytest.approx(np.log(0.34), abs=1e-6)
    assert found.topk_logprob[0, 0] == np.float16(np.log(0.34))
    assert float(found.tail_logprob[0]) == pytest.approx(np.log(0.66), abs=2e-3)


class Listed(FakeTeacher):
    """Notes what it was asked for."""

    asked: list[tuple[int, ScoreSpec]]

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """As the fake does."""
        self.asked = [*getattr(self, "asked", []), (len(rows), spec)]
        return super().score(rows, spec)


def make_rows(*lengths: int) -> list[ScoreRow]:
    """Rows of random ids, all but the first scored."""
    rng = np.random.default_rng(0)
    return [ScoreRow(rng.integers(0, VOCAB, n).astype(np.uint32), np.arange(1, n)) for n in lengths]


def test_rows_come_back_under_their_numbers() -> None:
    members = [Listed(0), Listed(1)]
    teacher = MixedTeacher(members, [0.5, 0.5], VOCAB)
    rows, spec = make_rows(4, 5, 12, 2, 9), ScoreSpec(topk=3, mass=0.9)
    found = dict(teacher.score(rows, spec))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert members[1].asked == [(5, replace(spec, topk=6, mass=1.0))]
    for index, row in enumerate(rows):
        alone = [dict(m.score([row], ScoreSpec(topk=6)))[0] for m in members]
        expected = mix(alone, [0.5, 0.5], row.token[row.targets], spec)
        assert found[index].topk_id.tolist() == expected.topk_id.tolist()


def test_a_row_is_ready_when_all_members_have_scored_it() -> None:
    """They work side by side, each in an order of its own, and end with the caller."""
    events: list[str] = []

    class Ordered(FakeTeacher):
        def __init__(self, name: str, order: list[int]) -> None:
            super().__init__()
            self.name, self.order = name, order

        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            scores = dict(super().score(rows, spec))
            try:
                for index in self.order:
                    events.append(f"{self.name}{index}")
                    yield index, scores[index]
            finally:
                events.append(f"{self.name} ends")

    members = [Ordered("a", [0, 1, 2, 3]), Ordered("b", [1, 0, 3, 2])]
    found = MixedTeacher(members, [0.5, 0.5], VOCAB).score(make_rows(2, 3, 4, 5), ScoreSpec(topk=3))
    assert [next(found)[0], next(found)[0]] == [0, 1]
    assert events == ["a0", "b1", "a1", "b0"]
    found.close()  # type: ignore[attr-defined]
    assert sorted(events[4:]) == ["a ends", "b ends"]
    whole = MixedTeacher(members, [0.5, 0.5], VOCAB).score(make_rows(2, 3, 4, 5), ScoreSpec(topk=3))
    assert [index for index, _ in whole] == [0, 1, 2, 3]


@pytest.mark.parametrize(("asked", "topk"), [(None, 6), (10, 10), (2, 3), (999, VOCAB)])
def test_more_entries_are_asked_for_than_are_kept(asked: int | None, topk: int) -> None:
    member = Listed(0)
    teacher = MixedTeacher([member, FakeTeacher(1)], [0.5, 0.5], VOCAB, asked)
    list(teacher.score(make_rows(3), ScoreSpec(topk=3)))
    assert member.asked[0][1].topk == topk


def test_the_class_says_what_is_mixed() -> None:
    members = [FakeTeacher(), FakeTeacher(), FakeTeacher(numeric_class="b-2")]
    classes = {
        MixedTeacher(members, [0.5, 0.25, 0.25], VOCAB, topk).numeric_class for topk in (None, 64)
    }
    kinds = ("twice", "top64")
    assert classes == {f"ensemble-3-{kind}-fake-1-float32-cpu+b-2" for kind in kinds}


def test_what_members_tell_of_their_work_adds_up() -> None:
    class Telling(FakeTeacher):
        def stats(self) -> dict[str, float]:
            return {"model_s": 1.5, "servers": 2.0}

    member = MixedTeacher([Telling(), FakeTeacher(), Telling()], [0.5, 0.25, 0.25], VOCAB)
    assert stats_of(member) == {"model_s": 3.0, "servers": 4.0}


def test_extra_ids_are_refused() -> None:
    teacher = MixedTeacher([FakeTeacher(), FakeTeacher()], [0.5, 0.5], VOCAB)
    with pytest.raises(ConfigError, match="extra_kind: expected none, with an ensemble; got tail"):
        next(teacher.score(make_rows(3), ScoreSpec(topk=3, extra=1, extra_kind="tail")))


def test_an_error_names_the_member_and_the_row() -> None:
    class Broken(FakeTeacher):
        def score(
            self, rows: Sequence[ScoreRow], spec: ScoreSpec
        ) -> Iterator[tuple[int, RowScores]]:
            raise NumericsError("row 1", "finite logits", "NaN", "Check it.")

    teacher = MixedTeacher([FakeTeacher(), Broken()], [0.5, 0.5], VOCAB)
    with pytest.raises(NumericsError, match=r"^member 1, row 1: expected finite"):
        list(teacher.score(make_rows(3, 3), ScoreSpec(topk=3)))


def test_what_has_no_probability_in_float64_has_a_logprob() -> None:
    sampled = np.array([1], np.uint32)
    listed = [dense_scores(np.array([[0.0, nats, -999.0]]), sampled, 2) for nats in (-800, -900)]
    found = mix(listed, [0.5, 0.5], sampled, ScoreSpec(topk=2))
    assert found.topk_id.tolist() == [[0, 1]]
    expected = [[0.0, np.float16(-800 + np.log(0.5))]]
    assert found.topk_logprob.tolist() == expected
    assert found.sampled_logprob[0] == pytest.approx(-800 + np.log(0.5), abs=1e-3)
    assert found.tail_logprob.tolist() == [-999.0]


def test_unused_entries_of_a_member_count_nothing() -> None:
    """A member whose vocabulary its list exhausts."""
    sampled = np.array([0], np.uint32)
    full = dense_scores(np.log([[0.5, 0.25, 0.25]]), sampled, 3)
    short = RowScores(
        topk_id=np.array([[2, UNUSED_ID, UNUSED_ID]], np.uint32),
        topk_logprob=np.array([[0, -np.inf, -np.inf]], np.float16),
        topk_count=np.array([1], np.uint16),
        tail_logprob=np.array([-np.inf], np.float16),
        sampled_logprob=np.array([-np.inf], np.float32),
    )
    found = mix([full, short], [0.5, 0.5], sampled, ScoreSpec(topk=3))
    assert found.topk_id.tolist() == [[2, 0, 1]]
    np.testing.assert_allclose(
        np.exp(found.topk_logprob[0].astype(float)), [0.625, 0.25, 0.125], rtol=2e-3
    )
