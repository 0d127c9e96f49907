"""Collating: which position scores which token, checked on rows written out by hand."""

import dataclasses
import inspect
import re
from typing import Any

import numpy as np
import pytest

from stillroom.cache.errors import InputError, ShapeError
from stillroom.replay.batch import Facts, MicroBatch, Row, collate, idle_micro_batch
from tests.replay.collate_twin import assert_collated


def hand_row(number: int, prompt: list[int], completion: list[int], **changes: Any) -> Row:
    """A row whose scores tell its number and the token that they are of: 100 * number + token."""
    scored = np.array(changes.pop("scored", [1] * len(completion)))
    target = np.array(completion)[scored == 1]
    value = 100 * number + target
    arrays = {
        "token": np.array(prompt + completion, np.uint32),
        "scored": np.array([0] * len(prompt) + list(scored), np.uint16),
        "prompt_length": np.array([len(prompt)], np.uint32),
        "topk_id": np.stack([target, np.full(len(target), 2**32 - 1)], 1).astype(np.uint32),
        "topk_logprob": np.stack([-value, np.full(len(target), -np.inf)], 1).astype(np.float16),
        "tail_logprob": (-value / 2).astype(np.float16),
        "sampled_logprob": -value.astype(np.float32),
        "behaviour_logprob": np.full(len(target), np.nan, np.float32),
        "policy_version_min": np.array([number + 5], np.int32),
        "policy_version_max": np.array([number + 9], np.int32),
        "source": np.array([number % 5], np.uint16),
    }
    return Row(number, arrays | changes, 1.0 + number, cache=number % 3)


def random_rows(rng: np.random.Generator) -> tuple[list[Row], list[int]]:
    """Rows with gaps, cuts, other K and M and perhaps weights, and groups that share prompts."""
    rows: list[Row] = []
    groups: list[int] = []
    while len(rows) < 12:
        prompt = rng.integers(0, 50, rng.integers(1, 6)).tolist()
        groups += [len(rows)] * int(rng.integers(1, 4))
        while len(rows) < len(groups):
            completion = rng.integers(0, 50, rng.integers(1, 9)).tolist()
            scored = rng.integers(0, 2, len(completion)).tolist()
            kept = sum(scored)
            changes: dict[str, Any] = {}
            for prefix, width in (("topk", rng.integers(1, 4)), ("extra", rng.integers(0, 3))):
                shape = kept, int(width)
                if width:
                    changes[f"{prefix}_id"] = rng.integers(0, 99, shape).astype(np.uint32)
                    changes[f"{prefix}_logprob"] = rng.normal(size=shape).astype(np.float16)
            if "extra_id" in changes:
                behaviour = rng.normal(size=changes["extra_id"].shape)
                changes["extra_behaviour_logprob"] = behaviour.astype(np.float32)
            if length := int(rng.choice([0, 1, kept])):
                changes["weight"] = rng.random(length, np.float32)
            row = hand_row(len(rows), prompt, completion, scored=scored, **changes)
            rows.append(cut_row(row, int(rng.choice([3, 99]))))
    return rows, groups


def cut_row(row: Row, tokens: int) -> Row:
    """The first tokens of a row and what scores them."""
    kept = int(row.arrays["scored"][:tokens].sum())
    ends = {"token": tokens, "scored": tokens}
    ends |= dict.fromkeys(
        ("prompt_length", "policy_version_min", "policy_version_max", "source"), 1
    )
    if len(row.arrays.get("weight", ())) == 1:
        ends["weight"] = 1
    arrays = {name: array[: ends.get(name, kept)] for name, array in row.arrays.items()}
    return dataclasses.replace(row, arrays=arrays)


def with_facts(row: Row) -> Row:
    """The same row as a reader gives it."""
    arrays = dict(row.arrays)
    (source,), (policy,) = arrays.pop("source"), arrays.pop("policy_version_min")
    target = np.flatnonzero(arrays.pop("scored")).astype(np.int32)
    return dataclasses.replace(row, arrays=arrays, facts=Facts(target, int(source), int(policy)))


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_are_collated_as_a_plain_twin_does(seed: int) -> None:
    rows, groups = random_rows(np.random.default_rng(seed))
    for given in (rows, [with_facts(row) for row in rows]):
        assert_collated(given, rows, None)
        assert_collated(given, rows, groups)
        assert_collated(given, rows, list(range(len(rows))))


def test_one_row_scores_every_token_of_its_completion() -> None:
    batch = collate([hand_row(3, [7, 8], [20, 21, 22])])
    assert batch.token.tolist() == [7, 8, 20, 21, 22]
    assert batch.position_id.tolist() == [0, 1, 2, 3, 4]
    assert batch.row_start.tolist() == [0, 5]
    assert batch.sampled_id.tolist() == [20, 21, 22], "position t scores completion[t]"
    assert batch.predict_index.tolist() == [1, 2, 3], "the last prompt token predicts the first"
    assert batch.num_positions == 3


def test_gaps_have_no_position_but_stay_in_the_context() -> None:
    batch = collate([hand_row(0, [7], [20, 21, 22, 23, 24], scored=[0, 1, 0, 0, 1])])
    assert batch.token.tolist() == [7, 20, 21, 22, 23, 24]
    assert batch.sampled_id.tolist() == [21, 24]
    assert batch.predict_index.tolist() == [1, 4]
    assert batch.token[batch.predict_index].tolist() == [20, 23], "also an unscored token predicts"


def test_rows_lie_end_to_end_and_predict_from_themselves() -> None:
    rows = [
        hand_row(4, [1, 2, 3], [30, 31]),
        hand_row(2, [5], [40]),
        hand_row(9, [6, 6], [50, 51, 52], scored=[1, 0, 1]),
    ]
    batch = collate(rows)
    assert batch.row_start.tolist() == [0, 5, 7, 12]
    assert batch.prefix.tolist() == [-1, -1, -1]
    assert batch.position_id.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert batch.sampled_id.tolist() == [30, 31, 40, 50, 52]
    assert batch.predict_index.tolist() == [2, 3, 5, 8, 10]
    assert batch.row.tolist() == [4, 4, 2, 9, 9]
    assert batch.policy_version.tolist() == [9, 9, 7, 14, 14], "the oldest policy of the row"
    assert batch.source.tolist() == [4, 4, 2, 4, 4]
    assert batch.cache.tolist() == [1, 1, 2, 0, 0]
    assert batch.sampling_temperature.tolist() == [5, 5, 3, 10, 10]
    assert np.array_equal(batch.sampled_logprob, -(100.0 * batch.row + batch.sampled_id))
    assert np.array_equal(batch.topk_id[:, 0], batch.sampled_id)
    assert np.array_equal(batch.topk_logprob[:, 0], batch.sampled_logprob)
    assert np.array_equal(batch.tail_logprob, batch.sampled_logprob / 2)
    assert (batch.topk_id[:, 1] == -1).all()
    assert np.isneginf(batch.topk_logprob[:, 1]).all()
    assert np.isnan(batch.behaviour_logprob).all()


def test_arrays_have_the_dtypes_that_are_documented() -> None:
    batch = collate([hand_row(1, [1], [2, 3]), hand_row(2, [4], [5])])
    text = inspect.getsource(MicroBatch)
    for field in dataclasses.fields(MicroBatch):
        array = getattr(batch, field.name)
        found = re.search(rf'\n    {field.name}: np.ndarray\n    """\((.*?)\) (\w+)', text)
        assert found is not None, field.name
        axes = found[1].rstrip(",").split(", ")
        assert (array.ndim, array.dtype.name) == (len(axes), found[2]), field.name


def test_the_large_arrays_take_six_bytes_an_entry() -> None:
    batch = collate([hand_row(1, [1], [2, 3])])
    assert batch.topk_id.nbytes + batch.topk_logprob.nbytes == 6 * batch.topk_id.size


def test_extra_ids_go_with_their_positions() -> None:
    def extra(*ids: list[int]) -> dict[str, np.ndarray]:
        array = np.array(ids, np.uint32)
        return {
            "extra_id": array,
            "extra_logprob": -array.astype(np.float16),
            "extra_behaviour_logprob": array.astype(np.float32) / 2,
        }

    rows = [
        hand_row(1, [1], [2, 3, 4], scored=[1, 0, 1], **extra([7, 8], [9, 10])),
        hand_row(2, [4], [5], **extra([11, 12])),
    ]
    batch = collate(rows)
    assert batch.extra_id.tolist() == [[7, 8], [9, 10], [11, 12]]
    assert np.array_equal(batch.extra_logprob, -batch.extra_id)
    assert np.array_equal(batch.extra_behaviour_logprob, batch.extra_id / 2)
    types = [batch.extra_id.dtype, batch.extra_logprob.dtype, batch.extra_behaviour_logprob.dtype]
    assert types == [np.int32, np.float16, np.float32]


def test_without_extra_ids_there_are_none() -> None:
    batch = collate([hand_row(1, [1], [2, 3])])
    assert batch.extra_id.shape == batch.extra_logprob.shape == (2, 0)
    assert batch.extra_behaviour_logprob.shape == (2, 0)


def test_rows_of_caches_with_other_sizes_are_filled_up() -> None:
    ids = np.array([[7, 8, 9], [1, 2, 2**32 - 1]], np.uint32)
    wide = {"topk_id": ids, "topk_logprob": -np.arange(6).reshape(2, 3).astype(np.float16)}
    extra = {
        "extra_id": np.array([[3], [4]], np.uint32),
        "extra_logprob": np.array([[-1], [-2]], np.float16),
        "extra_behaviour_logprob": np.array([[-3], [np.nan]], np.float32),
    }
    batch = collate([hand_row(1, [1], [5]), hand_row(2, [1], [2, 3], **wide, **extra)])
    assert batch.topk_id.tolist() == [[5, -1, -1], [7, 8, 9], [1, 2, -1]]
    inf = -np.inf
    assert batch.topk_logprob.tolist() == [[-105, inf, inf], [0, -1, -2], [-3, -4, -5]]
    assert batch.extra_id.tolist() == [[-1], [3], [4]]
    assert batch.extra_logprob.tolist() == [[inf], [-1], [-2]]
    np.testing.assert_array_equal(batch.extra_behaviour_logprob, [[np.nan], [-3], [np.nan]])


@pytest.mark.parametrize("token_id", [2**31, 2**32 - 2])
def test_ids_that_do_not_fit_are_refused(token_id: int) -> None:
    ids = np.array([[2**31 - 1, 2**32 - 1], [token_id, 3]], np.uint32)
    row = hand_row(4, [1], [2, 3], topk_id=ids)
    message = rf"row 4, topk_id: expected token ids below 2\*\*31; got {token_id}\."
    with pytest.raises(InputError, match=message):
        collate([row])
    with pytest.raises(InputError, match=message):
        collate([row, hand_row(1, [1], [2], topk_id=np.zeros((1, 3), np.uint32))])
    with pytest.raises(InputError, match=message):
        collate([hand_row(1, [1], [2, 5], topk_id=ids[:1].repeat(2, axis=0)), row])


@pytest.mark.parametrize("name", ["topk_id", "tail_logprob", "behaviour_logprob"])
def test_columns_of_other_lengths_are_refused(name: str) -> None:
    row = hand_row(4, [1], [2, 3])
    row.arrays[name] = row.arrays[name][:1]
    with pytest.raises(ShapeError, match=f"row 4, {name}: expected 2 positions.*; got 1"):
        collate([row])


def test_weights_stand_at_their_positions() -> None:
    """One for the whole row, one a position, or none, which is 1."""
    weights = {"weight": np.array([0.25, 0, 3], np.float32)}
    one = {"weight": np.array([0.5], np.float32)}
    rows = [
        hand_row(0, [1], [2, 3, 4, 5], scored=[1, 0, 1, 1], **weights),
        hand_row(1, [1], [2, 3], **one),
        hand_row(2, [1], [2, 3]),
    ]
    assert collate(rows).weight.tolist() == [0.25, 0, 3, 0.5, 0.5, 1, 1]
    assert collate(rows[2:]).weight.tolist() == [1, 1]
    assert collate(rows).weight.dtype == np.float32


@pytest.mark.parametrize("weight", [-0.5, np.nan, np.inf])
def test_weights_that_are_no_weights_are_refused(weight: float) -> None:
    rows = [
        hand_row(4, [1], [2, 3]),
        hand_row(6, [1], [2, 3], weight=np.array([1, weight], np.float32)),
    ]
    with pytest.raises(InputError, match=f"row 6, its weights: expected finite.*; got {weight}"):
        collate(rows)
    rows[1].arrays["weight"] = np.ones(3, np.float32)
    with pytest.raises(ShapeError, match="row 6, its weights: expected 1 or 2 of them; got 3"):
        collate(rows)


SHARED = [
    hand_row(0, [7, 8, 9], [20, 21]),
    hand_row(1, [7, 8, 9], [30], scored=[1]),
    hand_row(2, [7, 8, 9], [40, 41, 42], scored=[0, 1, 1]),
    hand_row(3, [7, 8, 9], [50]),
    hand_row(4, [1, 2], [60, 61]),
]


def test_a_prompt_that_rows_share_is_laid_down_once() -> None:
    batch = collate(SHARED, groups=[5, 5, 5, 6, 5])
    assert batch.token.tolist() == [7, 8, 9, 20, 21, 30, 40, 41, 42, 7, 8, 9, 50, 1, 2, 60, 61]
    assert batch.position_id.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.row_start.tolist() == [0, 3, 5, 6, 9, 13, 17]
    assert batch.prefix.tolist() == [-1, 0, 0, 0, -1, -1]
    assert batch.sampled_id.tolist() == [20, 21, 30, 41, 42, 50, 60, 61]
    assert batch.predict_index.tolist() == [2, 3, 2, 6, 7, 11, 14, 15]


def test_sharing_changes_nothing_else() -> None:
    whole, shared = collate(SHARED), collate(SHARED, groups=[0, 0, 0, 0, 1])
    for name in ("token", "position_id"):
        at = {
            n: getattr(batch, name)[batch.predict_index]
            for n, batch in (("whole", whole), ("shared", shared))
        }
        assert at["whole"].tolist() == at["shared"].tolist(), name
    layout = {"token", "position_id", "row_start", "prefix", "predict_index"}
    for field in dataclasses.fields(MicroBatch):
        if field.name not in layout:
            one, other = getattr(whole, field.name), getattr(shared, field.name)
            np.testing.assert_array_equal(one, other, err_msg=field.name)


@pytest.mark.parametrize(
    "prompt", [[7, 8, 1], [7, 8], [7, 8, 9, 20]], ids=["other", "shorter", "longer"]
)
def test_a_group_of_several_prompts_is_refused(prompt: list[int]) -> None:
    rows = [SHARED[0], SHARED[1], hand_row(6, prompt, [20, 21])]
    assert collate(rows, groups=[0, 0, 1]).prefix.tolist() == [-1, 0, 0, -1]
    with pytest.raises(InputError, match=r"row 6: expected the prompt of row 0.*; got another"):
        collate(rows, groups=[0, 0, 0])


def test_rows_cut_within_their_prompt_share_what_is_left() -> None:
    cut = hand_row(1, [7, 8, 9], [])
    cut.arrays["token"], cut.arrays["scored"] = (cut.arrays[n][:2] for n in ("token", "scored"))
    batch = collate([SHARED[0], cut], groups=[0, 0])
    assert batch.token.tolist() == [7, 8, 9, 20, 21]
    assert batch.row_start.tolist() == [0, 2, 5, 5]
    assert batch.predict_index.tolist() == [2, 3]


def test_results_are_written_into_what_is_given() -> None:
    given: list[np.ndarray] = []

    def poisoned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        array.view(np.uint8)[...] = 0xA5
        given.append(array)
        return array

    batch = collate(SHARED, groups=[0, 0, 0, 0, 1], empty=poisoned)
    plain = collate(SHARED, groups=[0, 0, 0, 0, 1])
    for array, field in zip(given, dataclasses.fields(MicroBatch), strict=True):
        assert getattr(batch, field.name) is array
        np.testing.assert_array_equal(array, getattr(plain, field.name), err_msg=field.name)


def test_a_collated_batch_shares_no_memory_with_its_rows() -> None:
    row = hand_row(1, [1], [2, 3])
    batch = collate([row])
    for name in ("topk_id", "tail_logprob", "sampled_logprob", "behaviour_logprob"):
        assert not np.shares_memory(getattr(batch, name), row.arrays[name]), name


def test_an_idle_micro_batch_is_a_micro_batch_with_nothing_to_learn() -> None:
    idle, real = idle_micro_batch(), collate([hand_row(1, [1], [2])])
    for field in dataclasses.fields(MicroBatch):
        one, other = getattr(idle, field.name), getattr(real, field.name)
        assert (one.dtype, one.ndim) == (other.dtype, other.ndim), field.name
    assert idle.row_start.tolist() == [0, 1]
    assert idle.prefix.tolist() == [-1]
    assert idle.predict_index.tolist() == [0]
    for name in ("sampled_logprob", "tail_logprob", "behaviour_logprob"):
        assert np.isnan(getattr(idle, name)).all(), "a loss of it would not go unnoticed"
