"""Collating: which position scores which token, checked on rows written out by hand."""

import dataclasses
from typing import Any

import numpy as np

from stillroom.replay.batch import MicroBatch, Row, collate, idle_micro_batch


def hand_row(number: int, prompt: list[int], completion: list[int], **changes: Any) -> Row:
    """A row whose scores tell its number and the token that they are of: 100 * number + token."""
    scored = np.array(changes.pop("scored", [1] * len(completion)))
    target = np.array(completion)[scored == 1]
    value = 100 * number + target
    arrays = {
        "token": np.array(prompt + completion, np.uint32),
        "scored": np.array([0] * len(prompt) + list(scored), np.uint16),
        "topk_id": np.stack([target, np.full(len(target), 2**32 - 1)], 1).astype(np.uint32),
        "topk_logprob": np.stack([-value, np.full(len(target), -np.inf)], 1).astype(np.float16),
        "tail_logprob": (-value / 2).astype(np.float16),
        "sampled_logprob": -value.astype(np.float32),
        "behaviour_logprob": np.full(len(target), np.nan, np.float32),
        "policy_version_min": np.array([number + 5], np.int32),
        "policy_version_max": np.array([number + 9], np.int32),
        "source": np.array([number % 5], np.uint16),
    }
    return Row(number, arrays | changes, 1.0 + number)


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
    assert batch.position_id.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert batch.sampled_id.tolist() == [30, 31, 40, 50, 52]
    assert batch.predict_index.tolist() == [2, 3, 5, 8, 10]
    assert batch.row.tolist() == [4, 4, 2, 9, 9]
    assert batch.policy_version.tolist() == [9, 9, 7, 14, 14], "the oldest policy of the row"
    assert batch.source.tolist() == [4, 4, 2, 4, 4]
    assert batch.sampling_temperature.tolist() == [5, 5, 3, 10, 10]
    assert np.array_equal(batch.sampled_logprob, -(100.0 * batch.row + batch.sampled_id))
    assert np.array_equal(batch.topk_id[:, 0], batch.sampled_id)
    assert np.array_equal(batch.topk_logprob[:, 0], batch.sampled_logprob)
    assert np.array_equal(batch.tail_logprob, batch.sampled_logprob / 2)
    assert (batch.topk_id[:, 1] == 2**32 - 1).all()
    assert np.isneginf(batch.topk_logprob[:, 1]).all()
    assert np.isnan(batch.behaviour_logprob).all()


def test_dtypes_are_those_that_tensors_need() -> None:
    batch = collate([hand_row(1, [1], [2, 3]), hand_row(2, [4], [5])])
    assert batch.row_start.dtype == np.int32
    for name in ("token", "position_id", "predict_index", "sampled_id", "topk_id"):
        assert getattr(batch, name).dtype == np.int64, name
    for name in ("policy_version", "source", "row"):
        assert getattr(batch, name).dtype == np.int64, name
    for name in ("topk_logprob", "tail_logprob", "sampled_logprob", "behaviour_logprob"):
        assert getattr(batch, name).dtype == np.float32, name
    assert batch.sampling_temperature.dtype == np.float32


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
    assert types == [np.int64, np.float32, np.float32]


def test_without_extra_ids_there_are_none() -> None:
    batch = collate([hand_row(1, [1], [2, 3])])
    assert batch.extra_id.shape == batch.extra_logprob.shape == (2, 0)
    assert batch.extra_behaviour_logprob.shape == (2, 0)


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
    assert idle.predict_index.tolist() == [0]
    for name in ("sampled_logprob", "tail_logprob", "behaviour_logprob"):
        assert np.isnan(getattr(idle, name)).all(), "a loss of it would not go unnoticed"
