"""The check of a whole shard."""

import numpy as np
import pytest

from stillroom.cache import check_arrays as module
from stillroom.cache.check_arrays import check_arrays
from stillroom.cache.errors import ShapeError
from stillroom.cache.schema import COLUMNS, EDGE_OF, UNUSED_ID, Arrays
from tests.cache.fakes import TOPK, random_arrays

STORED = [column for column in COLUMNS if column.width != "M"]
NAMES = [column.name for column in STORED]


@pytest.fixture
def arrays() -> Arrays:
    """A whole shard whose axes all differ in length."""
    return random_arrays(seed=1, positions=30, sequences=4)


def test_a_whole_shard_is_taken(arrays: Arrays) -> None:
    check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_named(arrays: Arrays, name: str) -> None:
    del arrays[name]
    with pytest.raises(ShapeError, match=rf"^column '{name}': expected .*; got nothing"):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_another_dtype_is_named(arrays: Arrays, name: str) -> None:
    arrays[name] = arrays[name].astype(np.float64)
    with pytest.raises(ShapeError, match=rf"^column '{name}': .*got float64"):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_another_rank_is_named(arrays: Arrays, name: str) -> None:
    arrays[name] = arrays[name][..., None]
    with pytest.raises(ShapeError, match=rf"^column '{name}'"):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_without_a_dimension_is_refused(arrays: Arrays, name: str) -> None:
    arrays[name] = arrays[name].flatten()[:1].reshape(())
    with pytest.raises(ShapeError):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_is_too_short_is_refused(arrays: Arrays, name: str) -> None:
    arrays[name] = arrays[name][:-1]
    with pytest.raises(ShapeError):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("name", sorted(EDGE_OF.values()))
@pytest.mark.parametrize("offsets", [[1, 1, 2, 2], [0, 2, 1, 2], [0, 1, 2, 2**64 - 1]])
def test_offsets_must_cut_their_axis(arrays: Arrays, name: str, offsets: list[int]) -> None:
    end = int(arrays[name][-1])
    arrays[name] = np.array([*offsets, end], np.uint64)
    with pytest.raises(ShapeError, match=rf"^column '{name}': expected offsets from 0 up to {end}"):
        check_arrays(arrays, TOPK, 0)


def test_the_scored_mask_must_count_the_positions(arrays: Arrays) -> None:
    arrays["scored"][:] = 0
    with pytest.raises(ShapeError, match=r"^column 'scored': expected 30 ones"):
        check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize("count", [0, TOPK + 1])
def test_a_count_is_of_one_to_k_entries(arrays: Arrays, count: int) -> None:
    arrays["topk_count"][9] = count
    with pytest.raises(ShapeError, match=r"^column 'topk_count': expected 1 to 5; got"):
        check_arrays(arrays, TOPK, 0)


def cut(arrays: Arrays, position: int, count: int) -> None:
    """Leave a position fewer entries."""
    arrays["topk_count"][position] = count
    arrays["topk_id"][position, count:] = UNUSED_ID
    arrays["topk_logprob"][position, count:] = -np.inf


def test_fewer_entries_than_k_are_taken(arrays: Arrays) -> None:
    for position in range(TOPK):
        cut(arrays, position, position + 1)
    check_arrays(arrays, TOPK, 0)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("topk_id", (6, 1), UNUSED_ID),
        ("topk_id", (6, 2), 7),
        ("topk_logprob", (6, 3), -1),
        ("topk_count", (6,), 3),
    ],
)
@pytest.mark.parametrize("block", [65_536, 4])
def test_entries_must_fit_their_count(
    arrays: Arrays,
    name: str,
    at: tuple[int, ...],
    value: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHECKED_ROWS", block)
    cut(arrays, 6, 2)
    arrays[name][at] = value
    with pytest.raises(ShapeError, match=r"^column 'topk_(id|logprob)': expected .* where|only"):
        check_arrays(arrays, TOPK, 0)


@pytest.fixture
def with_extra(arrays: Arrays) -> Arrays:
    """The same with three extra ids a position, of which one is unused."""
    arrays["extra_id"] = np.arange(90, dtype=np.uint32).reshape(30, 3)
    arrays["extra_logprob"] = np.full((30, 3), -1, np.float16)
    arrays["extra_behaviour_logprob"] = np.full((30, 3), -2, np.float32)
    arrays["extra_id"][5, 2] = UNUSED_ID
    arrays["extra_logprob"][5, 2] = -np.inf
    arrays["extra_behaviour_logprob"][5, 2] = np.nan
    return arrays


def test_extra_columns_are_taken(with_extra: Arrays) -> None:
    check_arrays(with_extra, TOPK, 3)
    with_extra["extra_behaviour_logprob"][:] = np.nan
    check_arrays(with_extra, TOPK, 3)


@pytest.mark.parametrize("name", ["extra_logprob", "extra_behaviour_logprob"])
def test_what_has_no_id_has_no_score(with_extra: Arrays, name: str) -> None:
    with_extra[name][5, 2] = -1
    with pytest.raises(ShapeError, match=rf"^column '{name}': .*where there is no id"):
        check_arrays(with_extra, TOPK, 3)


def test_extra_columns_of_a_cache_without_extra_ids_are_refused(with_extra: Arrays) -> None:
    with pytest.raises(ShapeError, match=r"^column 'extra_\w+': expected a declared column"):
        check_arrays(with_extra, TOPK, 0)


def test_another_topk_is_refused(arrays: Arrays) -> None:
    with pytest.raises(ShapeError, match=r"^column 'topk_id': expected uint32\[30, 6\]"):
        check_arrays(arrays, TOPK + 1, 0)


def test_extra_columns_are_needed_when_there_are_extra_ids(arrays: Arrays) -> None:
    with pytest.raises(ShapeError, match=r"^column 'extra_id'"):
        check_arrays(arrays, TOPK, 3)


@pytest.mark.parametrize("length", [4, 30])
def test_a_user_column_goes_with_sequences_or_positions(arrays: Arrays, length: int) -> None:
    check_arrays(arrays | {"x_reward": np.zeros(length, np.float32)}, TOPK, 0)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("x_reward", np.zeros(4)),
        ("x_reward", np.zeros(5, np.float32)),
        ("x_reward", np.zeros((4, 2), np.float32)),
        ("reward", np.zeros(4, np.float32)),
        ("x_", np.zeros(4, np.float32)),
        ("x_a/../b", np.zeros(4, np.float32)),
    ],
)
def test_other_columns_are_refused_by_name(arrays: Arrays, name: str, array: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=f"^column '{name}'"):
        check_arrays(arrays | {name: array}, TOPK, 0)
