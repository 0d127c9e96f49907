"""Places in epochs: steps against a brute-force list of epochs."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.replay.place import LAST_BATCHES, Place, Span, after_steps, next_step, steps_in

sizes = st.lists(st.integers(1, 20), min_size=1, max_size=6)
"""Rows of epochs, over and over: a thinned epoch has fewer."""
batches = st.integers(1, 45)


def flat(spans: list[Span]) -> list[tuple[int, int]]:
    """(epoch, row) of every row of a step."""
    return [(span.epoch, row) for span in spans for row in range(span.start, span.stop)]


def walk(
    sizes: list[int], batch: int, last_batch: str, steps: int, place: Place | None = None
) -> list[list[tuple[int, int]]]:
    """The rows of each of so many steps."""
    at, out = place or Place(), []
    for _ in range(steps):
        spans, at = next_step(at, batch, lambda epoch: sizes[epoch % len(sizes)], last_batch)
        assert all(span.start < span.stop for span in spans)
        out.append(flat(spans))
        assert at.first < sizes[at.epoch % len(sizes)], "a place is before a row"
    return out


def listed(
    sizes: list[int], batch: int, last_batch: str, steps: int
) -> list[list[tuple[int, int]]]:
    """The same, out of lists of whole epochs."""
    epochs = [
        [(epoch, row) for row in range(sizes[epoch % len(sizes)])]
        for epoch in range(steps * batch + 1)
    ]
    if last_batch == "carry":
        every = [row for epoch in epochs for row in epoch]
        return [every[i * batch : (i + 1) * batch] for i in range(steps)]
    out: list[list[tuple[int, int]]] = []
    for epoch in epochs:
        cut = [epoch[i : i + batch] for i in range(0, len(epoch), batch)]
        short = last_batch == "drop" and len(cut) > 1 and len(cut[-1]) < batch
        out += cut[:-1] if short else cut
    return out[:steps]


@given(sizes, batches, st.sampled_from(LAST_BATCHES), st.integers(1, 12))
def test_steps_are_those_of_a_list_of_epochs(
    sizes: list[int], batch: int, last_batch: str, steps: int
) -> None:
    assert walk(sizes, batch, last_batch, steps) == listed(sizes, batch, last_batch, steps)


@given(sizes, batches, st.sampled_from(LAST_BATCHES))
def test_each_row_of_an_epoch_comes_once_or_less_than_a_batch_is_dropped(
    sizes: list[int], batch: int, last_batch: str
) -> None:
    taken = [row for step in walk(sizes, batch, last_batch, 60) for row in step]
    assert all(one < other for one, other in pairwise(taken)), "in order, none twice"
    counts = Counter(epoch for epoch, _ in taken)
    for epoch in range(taken[-1][0]):
        rows, came = sizes[epoch % len(sizes)], counts[epoch]
        assert came == rows if last_batch != "drop" else 0 <= rows - came < batch
        assert came > 0


@given(sizes, batches, st.sampled_from(LAST_BATCHES), st.data())
def test_it_goes_on_from_anywhere(
    sizes: list[int], batch: int, last_batch: str, data: st.DataObject
) -> None:
    epoch = data.draw(st.integers(0, 3))
    first = data.draw(st.integers(0, sizes[epoch % len(sizes)] - 1))
    taken = [row for step in walk(sizes, batch, last_batch, 4, Place(epoch, first)) for row in step]
    left = [(epoch, row) for row in range(first, sizes[epoch % len(sizes)])]
    if last_batch == "drop" and (first or len(left) > batch):
        left = left[: len(left) // batch * batch]
    expected = [*left, (epoch + 1, 0)]
    assert taken[: len(expected)] == expected[: len(taken)]


@given(sizes, batches, batches, st.sampled_from(("keep", "carry")), st.integers(1, 9))
def test_another_batch_goes_on_with_the_next_row(
    sizes: list[int], batch: int, other: int, last_batch: str, steps: int
) -> None:
    at = Place()
    before: list[tuple[int, int]] = []
    for _ in range(steps):
        spans, at = next_step(at, batch, lambda epoch: sizes[epoch % len(sizes)], last_batch)
        before += flat(spans)
    after = [row for step in walk(sizes, other, last_batch, 4, at) for row in step]
    every = walk(sizes, 1, last_batch, len(before) + len(after))
    assert [[row] for row in before + after] == every


def test_no_row_is_wanted_of_a_cache_whose_turn_it_is_not() -> None:
    assert next_step(Place(2, 3), 0, lambda _: 5, "carry") == ([], Place(2, 3))


def test_a_million_steps_on_is_one_addition_away() -> None:
    asked = []

    def rows_in(epoch: int) -> int:
        asked.append(epoch)
        return 10

    spans, after = next_step(Place(10**6, 8), 4, rows_in, "carry")
    assert spans == [Span(10**6, 8, 10), Span(10**6 + 1, 0, 2)]
    assert after == Place(10**6 + 1, 2)
    assert set(asked) == {10**6, 10**6 + 1}


@pytest.mark.parametrize(
    ("rows", "batch", "keep", "drop"), [(10, 5, 2, 2), (11, 5, 3, 2), (4, 5, 1, 1), (5, 5, 1, 1)]
)
def test_steps_of_an_epoch(rows: int, batch: int, keep: int, drop: int) -> None:
    assert [steps_in(rows, batch, kind) for kind in ("keep", "carry", "drop")] == [keep, keep, drop]
    own = [step for step in walk([rows], batch, "drop", 9) if step[0][0] == 0]
    assert len(own) == drop


@given(
    rows=st.integers(1, 30),
    batch=st.integers(1, 40),
    start=st.integers(0, 29),
    steps=st.integers(0, 40),
    last_batch=st.sampled_from(LAST_BATCHES),
)
def test_many_steps_at_once_end_where_one_after_another_does(
    rows: int, batch: int, start: int, steps: int, last_batch: str
) -> None:
    place = Place(3, start % rows)
    expected = place
    for _ in range(steps):
        _, expected = next_step(expected, batch, lambda _: rows, last_batch)
    if steps:
        assert after_steps(place, steps, batch, rows, last_batch) == expected
