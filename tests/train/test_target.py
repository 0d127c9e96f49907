"""The rules that turn stored teacher scores into bucket masses."""

import math
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.cache.errors import CorruptError, MismatchError, NumericsError, ShapeError
from stillroom.train.target import (
    TAIL_FLOOR_NATS,
    TeacherTarget,
    log1mexp,
    teacher_buckets,
)

UNUSED_ID = 2**32 - 1
INF, NAN = math.inf, math.nan


def row_of(**changes: Any) -> TeacherTarget:
    """One position over 8 tokens: .5 .2 .1 kept, tail .2, of which the sampled token has .05."""
    values: dict[str, Any] = {
        "topk_id": [[3, 1, 6]],
        "topk_logprob": [[math.log(0.5), math.log(0.2), math.log(0.1)]],
        "tail_logprob": [math.log(0.2)],
        "sampled_id": [0],
        "sampled_logprob": [math.log(0.05)],
        "behaviour_logprob": [-1.0],
        "mask": [True],
    } | changes
    return TeacherTarget(**{name: as_tensor(name, value) for name, value in values.items()})


def as_tensor(name: str, value: Any) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return value
    if name == "mask":
        return torch.tensor(value)
    return torch.tensor(value, dtype=torch.int64 if name.endswith("id") else torch.float64)


def with_extras(*pairs: tuple[int, float], **changes: Any) -> TeacherTarget:
    """The same position with extra ids, given as (id, probability)."""
    ids = torch.tensor([[token for token, _ in pairs]], dtype=torch.int64)
    return row_of(
        extra_id=ids.reshape(1, len(pairs)),
        extra_logprob=torch.tensor([[p for _, p in pairs]], dtype=torch.float64).log(),
        **changes,
    )


def masses(target: TeacherTarget, vocab_size: int = 8, **options: bool) -> list[dict[int, float]]:
    """Return token -> probability for each row; the tail is token -1."""
    buckets = teacher_buckets(target, vocab_size, **options)
    rows = []
    for ids, logprob, exists in zip(
        buckets.token_id.tolist(), buckets.logprob.tolist(), buckets.exists.tolist(), strict=True
    ):
        assert len([token for token in ids if token < vocab_size]) == len(set(ids) - {vocab_size})
        assert all(lp == -INF for lp, there in zip(logprob, exists, strict=True) if not there)
        assert [token < vocab_size for token in ids] == exists[:-1]
        named = zip([*ids, -1], logprob, exists, strict=True)
        rows.append({token: math.exp(lp) for token, lp, there in named if there})
    return rows


def test_sampled_token_outside_topk_leaves_the_tail() -> None:
    expected = {3: 0.5, 1: 0.2, 6: 0.1, 0: 0.05, -1: 0.15}
    assert masses(row_of()) == [pytest.approx(expected, abs=1e-12)]


def test_sampled_token_in_topk_keeps_the_kept_score() -> None:
    target = row_of(sampled_id=[1], sampled_logprob=[math.log(0.2) + 0.04])
    assert masses(target) == [pytest.approx({3: 0.5, 1: 0.2, 6: 0.1, -1: 0.2}, abs=1e-12)]


@pytest.mark.parametrize(
    ("unused_id", "unused_logprob"), [(UNUSED_ID, -INF), (2, -INF), (-1, -0.1), (-1, NAN)]
)
def test_unused_entries_are_dropped(unused_id: int, unused_logprob: float) -> None:
    target = row_of(
        topk_id=[[3, unused_id, 1, unused_id]],
        topk_logprob=[[math.log(0.5), unused_logprob, math.log(0.2), unused_logprob]],
        tail_logprob=[math.log(0.3)],
    )
    assert masses(target) == [pytest.approx({3: 0.5, 1: 0.2, 0: 0.05, -1: 0.25}, abs=1e-12)]


def test_of_a_repeated_token_the_first_score_counts() -> None:
    first = math.log(0.2)
    target = row_of(
        topk_id=[[1, 3, 1, 1]],
        topk_logprob=[[first, math.log(0.5), first + 0.04, first - 0.04]],
        tail_logprob=[math.log(0.3)],
    )
    assert masses(target) == [pytest.approx({1: 0.2, 3: 0.5, 0: 0.05, -1: 0.25}, abs=1e-12)]


def test_gap_below_float16_spacing_is_not_a_disagreement() -> None:
    target = row_of(
        topk_id=[[3, 1]],
        topk_logprob=[[-1e-4, -200.0]],
        sampled_id=[1],
        sampled_logprob=[-200.06],
        tail_logprob=[math.log(1e-4)],
    )
    assert set(masses(target)[0]) == {3, 1, -1}


def test_positive_logprobs_are_clipped() -> None:
    tail = {"tail_logprob": [math.log(0.005)]}
    target = row_of(topk_id=[[0]], topk_logprob=[[0.004]], sampled_logprob=[0.0], **tail)
    assert masses(target) == [pytest.approx({0: 1 / 1.005, -1: 0.005 / 1.005}, abs=1e-12)]
    target = row_of(topk_id=[[-1]], topk_logprob=[[0.0]], tail_logprob=[0.004])
    assert masses(target) == [pytest.approx({0: 0.05, -1: 0.95}, abs=1e-12)]


@pytest.mark.parametrize("sampled_logprob", [math.log(0.2), math.log(0.205)])
def test_sampled_token_can_use_up_the_tail(sampled_logprob: float) -> None:
    buckets = teacher_buckets(row_of(sampled_logprob=[sampled_logprob]), 8)
    assert buckets.logprob[0, -1] == -INF
    assert bool(buckets.exists[0, -1])
    assert buckets.logprob.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_sampled_token_without_probability_stays_in_the_tail() -> None:
    expected = {3: 0.5, 1: 0.2, 6: 0.1, -1: 0.2}
    assert masses(row_of(sampled_logprob=[-INF])) == [pytest.approx(expected, abs=1e-12)]


def test_extra_ids_leave_the_tail_together() -> None:
    target = with_extras((2, 0.04), (7, 0.06))
    expected = {3: 0.5, 1: 0.2, 6: 0.1, 0: 0.05, 2: 0.04, 7: 0.06, -1: 0.05}
    assert masses(target) == [pytest.approx(expected, abs=1e-12)]
    buckets = teacher_buckets(target, 8)
    assert buckets.extra_column.tolist() == [[4, 5]]
    assert buckets.sampled_column.tolist() == [3]
    assert buckets.num_kept == 3


def test_repeated_extra_ids_share_a_bucket_and_keep_their_columns() -> None:
    """Kept, twice among the extras, sampled, unused, and without probability."""
    extras = [(1, 0.2), (2, 0.04), (0, 0.05), (2, 0.04), (-1, 0.5), (5, 0.0)]
    target = with_extras(*extras)
    expected = {3: 0.5, 1: 0.2, 6: 0.1, 0: 0.05, 2: 0.04, -1: 0.11}
    assert masses(target) == [pytest.approx(expected, abs=1e-12)]
    buckets = teacher_buckets(target, 8)
    tail = buckets.token_id.shape[1]
    assert tail == 10
    assert buckets.extra_column.tolist() == [[1, 5, 3, 5, -1, tail]]
    masked = teacher_buckets(with_extras(*extras, mask=[False]), 8)
    assert masked.extra_column.tolist() == [[-1] * 6]
    assert masked.sampled_column.tolist() == [0]


def test_a_scored_repeat_is_the_bucket_of_an_unscored_one() -> None:
    target = with_extras((0, 0.05), (2, 0.0), (2, 0.04), sampled_logprob=[-INF])
    buckets = teacher_buckets(target, 8)
    assert buckets.sampled_column.tolist() == [4]
    assert buckets.extra_column.tolist() == [[4, 6, 6]]
    expected = {3: 0.5, 1: 0.2, 6: 0.1, 0: 0.05, 2: 0.04, -1: 0.11}
    assert masses(target) == [pytest.approx(expected, abs=1e-12)]


def test_rounded_extras_can_use_up_the_tail() -> None:
    """Half precision rounded up sums to slightly more than the tail."""
    target = with_extras((2, 0.0751), (7, 0.0751))
    buckets = teacher_buckets(target, 8)
    assert buckets.logprob[0, -1] == -INF
    assert bool(buckets.exists[0, -1])
    assert buckets.logprob.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert teacher_buckets(target, 8, floor_tail=True).logprob[0, -1] == pytest.approx(
        TAIL_FLOOR_NATS, abs=1e-3
    )


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_scores_of_a_token_may_differ_in_precision(precision: torch.dtype) -> None:
    exact = torch.tensor([[-9.4321, -3.1234]], dtype=torch.float64)
    target = row_of(
        topk_logprob=[[math.log(0.5), -3.1234, -9.4321]],
        tail_logprob=[math.log(0.4)],
        extra_id=[[6, 1]],
        extra_logprob=exact.to(precision).double(),
    )
    buckets = teacher_buckets(target, 8, normalise=False)
    assert buckets.extra_column.tolist() == [[2, 1]]
    assert buckets.logprob[0, 2].item() == -9.4321


def test_kept_only_leaves_what_was_drawn_in_the_tail() -> None:
    target = with_extras((2, 0.04), (1, 0.2), (-1, 0.1))
    expected = {3: 0.5, 1: 0.2, 6: 0.1, -1: 0.2}
    assert masses(target, kept_only=True) == [pytest.approx(expected, abs=1e-12)]
    buckets = teacher_buckets(target, 8, kept_only=True)
    tail = buckets.token_id.shape[1]
    assert buckets.sampled_column.tolist() == [tail]
    assert buckets.extra_column.tolist() == [[tail, 1, -1]]
    kept = teacher_buckets(row_of(sampled_id=[6], sampled_logprob=[-2.3]), 8, kept_only=True)
    assert kept.sampled_column.tolist() == [2]


def test_masses_as_stored() -> None:
    target = row_of(topk_logprob=[[math.log(0.5), math.log(0.2), 0.001 + math.log(0.105)]])
    raw = teacher_buckets(target, 8, normalise=False).logprob.exp()
    assert raw[0, :3].tolist() == pytest.approx([0.5, 0.2, 0.105 * math.exp(0.001)])
    assert raw[0, 4].item() == pytest.approx(0.15)
    assert raw.sum().item() == pytest.approx(1.005105, abs=1e-6)


@pytest.mark.parametrize("num_rows", [0, 2])
@pytest.mark.parametrize("num_extra", [None, 0, 3])
@pytest.mark.parametrize("num_kept", [0, 2])
def test_empty_shapes(num_rows: int, num_extra: int | None, num_kept: int) -> None:
    extra = {} if num_extra is None else {"extra_id": torch.full((num_rows, num_extra), -1)}
    if num_extra is not None:
        extra["extra_logprob"] = torch.full((num_rows, num_extra), -INF)
    target = TeacherTarget(
        topk_id=torch.arange(num_kept).repeat(num_rows, 1),
        topk_logprob=torch.full((num_rows, num_kept), -2.0),
        tail_logprob=torch.full((num_rows,), -0.32),
        sampled_id=torch.full((num_rows,), 5),
        sampled_logprob=torch.full((num_rows,), -3.0),
        behaviour_logprob=None,
        mask=torch.ones(num_rows, dtype=torch.bool),
        **extra,
    )
    buckets = teacher_buckets(target, 8)
    width = num_kept + 1 + (num_extra or 0)
    assert buckets.token_id.shape == (num_rows, width)
    assert buckets.extra_column.shape == (num_rows, num_extra or 0)
    assert buckets.num_kept == num_kept
    assert buckets.sampled_column.tolist() == [num_kept] * num_rows
    assert buckets.logprob.exp().sum(1).tolist() == pytest.approx([1.0] * num_rows)


def test_row_without_entries_is_all_tail() -> None:
    target = row_of(
        topk_id=[[UNUSED_ID] * 3],
        topk_logprob=[[-INF] * 3],
        tail_logprob=[-INF],
        sampled_logprob=[-INF],
    )
    assert masses(target) == [{-1: 1.0}]


@pytest.mark.parametrize("stored_tail", [math.log(0.2), -INF, NAN, 5.0])
@pytest.mark.parametrize("floor_tail", [False, True])
def test_no_tail_bucket_where_the_vocabulary_is_covered(
    stored_tail: float, floor_tail: bool
) -> None:
    target = row_of(topk_id=[[3, 1, 2]], tail_logprob=[stored_tail])
    expected = {3: 0.5 / 0.85, 1: 0.2 / 0.85, 2: 0.1 / 0.85, 0: 0.05 / 0.85}
    assert masses(target, 4, floor_tail=floor_tail) == [pytest.approx(expected, abs=1e-12)]


def test_floor_raises_only_the_tail() -> None:
    target = row_of(
        topk_id=[[3, 1]],
        topk_logprob=[[math.log(0.95), -50.0]],
        tail_logprob=[-60.0],
        sampled_id=[1],
        sampled_logprob=[-50.0],
    )
    plain = teacher_buckets(target, 8).logprob[0]
    floored = teacher_buckets(target, 8, floor_tail=True).logprob[0]
    total = math.log(0.95)
    assert plain[[0, 1, 3]].tolist() == pytest.approx([0.0, -50.0 - total, -60.0 - total])
    assert floored[3].item() == pytest.approx(TAIL_FLOOR_NATS - total, abs=1e-7)
    assert floored[1].item() == pytest.approx(-50.0 - total, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_logprob": [[math.log(0.5), NAN, -3.0]]}, NumericsError, "row 0.*nan"),
        ({"sampled_logprob": [NAN]}, NumericsError, "nan"),
        ({"tail_logprob": [NAN]}, NumericsError, "tail"),
        ({"topk_id": [[3, 8, 6]]}, MismatchError, "0 to 7; got 8"),
        ({"topk_id": [[3, UNUSED_ID, 6]]}, MismatchError, "got 4294967295"),
        ({"sampled_id": [8]}, MismatchError, "got 8"),
        ({"sampled_id": [-100]}, MismatchError, "got -100"),
        ({"topk_id": [[3, 1, 3]]}, CorruptError, "0.05 nats apart; got 1.6"),
        ({"topk_id": [[3, 0, 6]]}, CorruptError, "0.05 nats apart; got 1.3"),
        ({"topk_logprob": [[0.0, -4.0, -9.0]]}, CorruptError, "sum to <= 1.01; got 1.2"),
        ({"topk_logprob": [[3.0, -INF, -INF]]}, CorruptError, "got 20"),
        ({"topk_logprob": [[INF, -INF, -INF]]}, CorruptError, "got inf"),
        ({"sampled_logprob": [math.log(0.3)]}, CorruptError, "got 1.1"),
        ({"tail_logprob": [0.1]}, CorruptError, "got 1.9"),
        ({"tail_logprob": [math.log(0.9)]}, CorruptError, "got 1.7"),
        ({"tail_logprob": [math.log(0.22)]}, CorruptError, "got 1.02"),
        ({"extra_id": [[8]], "extra_logprob": [[-3.0]]}, MismatchError, "0 to 7; got 8"),
        ({"extra_id": [[8]], "extra_logprob": [[-INF]]}, MismatchError, "0 to 7; got 8"),
        ({"extra_id": [[2]], "extra_logprob": [[NAN]]}, NumericsError, "nan"),
        ({"extra_id": [[1]], "extra_logprob": [[-2.5]]}, CorruptError, "0.05 nats apart"),
        ({"extra_id": [[0]], "extra_logprob": [[-2.5]]}, CorruptError, "0.05 nats apart"),
        ({"extra_id": [[2, 7]], "extra_logprob": [[-2.0, -2.0]]}, CorruptError, "got 1.12"),
    ],
)
def test_unusable_scores_are_refused_only_where_scored(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for kept_only in (False, True):
        with pytest.raises(error, match=message):
            teacher_buckets(row_of(**changes), 8, kept_only=kept_only)
    assert masses(row_of(**changes, mask=[False])) == [{-1: 1.0}]


def test_error_names_the_row() -> None:
    target = TeacherTarget(
        topk_id=torch.tensor([[0], [9], [9]]),
        topk_logprob=torch.full((3, 1), -1.0),
        tail_logprob=torch.full((3,), -1.0),
        sampled_id=torch.zeros(3, dtype=torch.int64),
        sampled_logprob=torch.full((3,), -1.0),
        behaviour_logprob=None,
        mask=torch.tensor([True, False, True]),
    )
    with pytest.raises(MismatchError, match="row 2"):
        teacher_buckets(target, 8)


entries = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 4, 5, UNUSED_ID, -1]),
        st.one_of(st.floats(-12.0, -2.25, width=16), st.just(-INF)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    entries,
    st.integers(0, 3),
    st.floats(-12.0, 0.0, width=16),
    st.booleans(),
    st.booleans(),
)
def test_masses_equal_the_rules_written_out(
    brute_force: ModuleType,
    row: list[tuple[int, float]],
    num_extra: int,
    tail: float,
    floor_tail: bool,
    normalise: bool,
) -> None:
    score: dict[int, float] = {}
    row = [
        (token, -INF if token == UNUSED_ID else score.setdefault(token, logprob))
        for token, logprob in row
    ]
    sampled = max(token if 0 <= token < 6 else 0 for token, _ in row)
    num_kept = max(0, len(row) - num_extra)
    kept = sum(math.exp(logprob) for token, logprob in {*row[:num_kept]} if 0 <= token < 6)
    tail = min(tail, math.log1p(-kept))
    extra = [(-1 if token == UNUSED_ID else token, logprob) for token, logprob in row[num_kept:]]
    row = [*row[:num_kept], (sampled, score.get(sampled, -3.0)), *extra]
    ids, logprobs = [token for token, _ in row], [logprob for _, logprob in row]
    target = row_of(
        topk_id=torch.tensor([ids[:num_kept]], dtype=torch.int64),
        topk_logprob=torch.tensor([logprobs[:num_kept]], dtype=torch.float64),
        tail_logprob=[tail],
        sampled_id=[sampled],
        sampled_logprob=[row[num_kept][1]],
        extra_id=torch.tensor([ids[num_kept + 1 :]], dtype=torch.int64),
        extra_logprob=torch.tensor([logprobs[num_kept + 1 :]], dtype=torch.float64),
    )
    log_floor = TAIL_FLOOR_NATS if floor_tail else -INF
    wanted = brute_force.stored_masses(
        row, tail, 6, log_floor, num_drawn=1 + len(extra), normalise=normalise
    )
    got = masses(target, 6, floor_tail=floor_tail, normalise=normalise)
    assert got == [pytest.approx({k: math.exp(v) for k, v in wanted.items()}, abs=1e-12)]
    assert not normalise or sum(got[0].values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("x", [-1e-300, -1e-12, -0.5, -math.log(2), -0.7, -30.0, -1000.0])
def test_log1mexp_inverts_itself(x: float) -> None:
    y = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    assert y == pytest.approx(math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)))


@pytest.mark.parametrize("x", [0.0, 1.0, INF])
def test_log1mexp_of_nothing_left(x: float) -> None:
    assert log1mexp(torch.tensor(x)).item() == -INF


@pytest.mark.parametrize(
    "changes",
    [
        {"topk_id": [3, 1, 6]},
        {"topk_logprob": [[-1.0, -2.0]]},
        {"tail_logprob": [-1.0, -2.0]},
        {"sampled_id": [[0]]},
        {"behaviour_logprob": [[-1.0]]},
        {"mask": [True, True]},
        {"topk_id": torch.tensor([[3, 1, 6]], dtype=torch.int32)},
        {"topk_logprob": torch.full((1, 3), -1.0, dtype=torch.float16)},
        {"mask": torch.tensor([1])},
        {"extra_id": [[2]]},
        {"extra_logprob": [[-3.0]]},
        {"extra_behaviour_logprob": [[-3.0]]},
        {"extra_id": [2], "extra_logprob": [-3.0]},
        {"extra_id": [[2]], "extra_logprob": [[-3.0, -4.0]]},
        {"extra_id": [[2], [3]], "extra_logprob": [[-3.0], [-3.0]]},
        {"extra_id": [[2]], "extra_logprob": [[-3.0]], "extra_behaviour_logprob": [-3.0]},
        {"sampling_temperature": [[1.0]]},
        {"sampling_temperature": torch.tensor([1])},
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match="TeacherTarget"):
        row_of(**changes)


def test_slice_move_and_pickle_keep_every_field() -> None:
    target = TeacherTarget(
        topk_id=torch.arange(12).reshape(6, 2),
        topk_logprob=torch.full((6, 2), -1.5),
        tail_logprob=torch.arange(6).float().neg(),
        sampled_id=torch.arange(6),
        sampled_logprob=torch.full((6,), -2.5),
        behaviour_logprob=torch.full((6,), NAN),
        mask=torch.arange(6) > 2,
        extra_id=torch.arange(18).reshape(6, 3),
        extra_logprob=torch.full((6, 3), -3.5),
        extra_behaviour_logprob=torch.full((6, 3), NAN),
        sampling_temperature=torch.linspace(0.5, 1.0, 6),
    )
    part = pickle.loads(pickle.dumps(target.slice(2, 5).to("cpu", torch.float64)))
    assert len(part) == 3
    assert part.topk_id.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert part.sampled_id.tolist() == [2, 3, 4]
    assert part.mask.tolist() == [False, True, True]
    assert part.tail_logprob.tolist() == [-2.0, -3.0, -4.0]
    assert {part.topk_logprob.dtype, part.behaviour_logprob.dtype} == {torch.float64}
    assert part.extra_id.tolist() == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert {part.extra_logprob.dtype, part.extra_behaviour_logprob.dtype} == {torch.float64}
    assert part.sampling_temperature.tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert target.to(dtype=torch.float32).topk_logprob is target.topk_logprob
    assert row_of(behaviour_logprob=None).slice(0, 1).behaviour_logprob is None


def test_no_position_and_no_kept_entry() -> None:
    assert masses(row_of().slice(0, 0)) == []
    target = row_of(
        topk_id=torch.zeros(1, 0, dtype=torch.int64),
        topk_logprob=torch.zeros(1, 0),
        tail_logprob=[0.0],
    )
    assert masses(target) == [pytest.approx({0: 0.05, -1: 0.95}, abs=1e-12)]
