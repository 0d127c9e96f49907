"""Random shards: whole, of every kind that was asked for, and the same for the same seed."""

from typing import Any

import numpy as np
import pytest

from stillroom.cache.check_arrays import check_arrays
from stillroom.cache.example_shards import USER_AXES, edges, random_shard, strange_floats
from stillroom.cache.schema import UNUSED_ID, Arrays
from tests.cache.fakes import same_bits

ALL: dict[str, Any] = {
    "positions": 3000,
    "sequences": 90,
    "topk": 7,
    "vocab_size": 50,
    "extra": 3,
    "mass": True,
    "user_columns": True,
}


def make(seed: int = 0, **changes: Any) -> Arrays:
    """A shard with everything, but for some settings."""
    return random_shard(seed, **ALL | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": 1, "sequences": 1},
        {"positions": 90},
        {"extra": 0},
        {"mass": False},
        {"teacher_prompts": False},
        {"user_columns": False},
        {"topk": 50},
        {"topk": 1, "vocab_size": 1},
    ],
    ids=str,
)
def test_a_shard_is_whole(changes: dict[str, Any]) -> None:
    settings = ALL | changes
    arrays = make(**changes)
    check_arrays(arrays, settings["topk"], settings["extra"])
    check_arrays(strange_floats(arrays, 1), settings["topk"], settings["extra"])
    assert (np.diff(arrays["position_start"]) > 0).all()
    used = arrays["topk_id"] != UNUSED_ID
    assert arrays["topk_id"][used].max() < settings["vocab_size"]
    assert used.all() or settings["mass"]
    for ids, count in zip(arrays["topk_id"], arrays["topk_count"], strict=True):
        assert len(set(ids[:count].tolist())) == count


def test_everything_is_there() -> None:
    arrays = make()
    assert set(arrays["topk_count"].tolist()) == set(range(1, 8))
    prompts = np.diff(arrays["teacher_prompt_start"])
    assert prompts.min() == 0 < prompts.max()
    tokens, positions = np.diff(arrays["sequence_start"]), np.diff(arrays["position_start"])
    others = tokens - positions - arrays["prompt_length"]
    assert others.min() == 0 < others.max(), "some tokens of completions are not scored"
    assert np.isnan(arrays["behaviour_logprob"]).any()
    assert np.isneginf(arrays["tail_logprob"]).any()
    assert (arrays["extra_id"] == UNUSED_ID).any()
    assert (arrays["policy_version_min"] == -1).any()
    assert len(make(teacher_prompts=False)["teacher_prompt"]) == 0


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    arrays = make(topk=50)
    whole, is_empty = arrays["topk_count"] == 50, np.isneginf(arrays["tail_logprob"])
    assert 0 < whole.sum() < 3000
    assert is_empty[whole].all()
    assert not is_empty[~whole].all()
    assert np.isneginf(make(topk=50, mass=False)["tail_logprob"]).all()


@pytest.mark.parametrize("vocab_size", [50, 2**24 + 1, 2**32 - 1])
def test_the_largest_id_is_there(vocab_size: int) -> None:
    arrays = make(vocab_size=vocab_size)
    for name in ("topk_id", "extra_id"):
        assert arrays[name][arrays[name] != UNUSED_ID].max() == vocab_size - 1


def test_user_columns_have_their_axes() -> None:
    sizes = {"sequence": 90, "position": 3000}
    found = {name: len(array) for name, array in make().items() if name.startswith("x_")}
    assert found == {name: sizes[axis] for name, axis in USER_AXES.items()}


def test_equal_seeds_give_equal_shards() -> None:
    first, again, other = make(5), make(5), make(6)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert not same_bits(first["topk_id"], other["topk_id"])


@pytest.mark.parametrize("name", ["sampled_logprob", "tail_logprob", "topk_logprob", "x_reward"])
def test_strange_floats_are_strange(name: str) -> None:
    array = strange_floats(make(sequences=900), 3)[name]
    bits = array.view(f"u{array.itemsize}")
    assert len(np.unique(bits[np.isnan(array)])) > 2, "several kinds of NaN"
    assert ((array == 0) & np.signbit(array)).any()
    assert ((array == 0) & ~np.signbit(array)).any()
    assert np.isneginf(array).any()
    assert np.isposinf(array).any()
    subnormal = (array != 0) & (np.abs(array) < np.finfo(array.dtype).smallest_normal)
    assert subnormal.any()


def test_edges_begin_at_zero() -> None:
    assert edges([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert edges([]).dtype == np.uint64
