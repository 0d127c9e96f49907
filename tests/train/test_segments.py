"""Segments: which tokens see which, and masks made once."""

import numpy as np
import pytest
import torch

from stillroom.cache.errors import ShapeError
from stillroom.train.segments import Segments, Span

CPU = torch.device("cpu")


def made(lengths: list[int], prefix: list[int]) -> Segments:
    """Segments of these lengths."""
    return Segments.of(np.cumsum([0, *lengths]).astype(np.int32), np.array(prefix), CPU)


def test_spans_name_what_a_segment_sees_before_itself() -> None:
    segments = made([3, 2, 4, 5], [-1, 0, 0, -1])
    assert segments.spans == (
        Span(0, 3, 0, 0),
        Span(3, 5, 0, 3),
        Span(5, 9, 0, 3),
        Span(9, 14, 9, 9),
    )
    assert segments.edge.tolist() == [0, 3, 5, 9, 14]
    assert segments.edge.dtype == torch.int32
    assert segments.longest == 5
    assert segments.shares
    assert not made([3, 2], [-1, -1]).shares


def test_an_empty_segment_has_no_span() -> None:
    assert made([3, 0, 2], [-1, 0, 0]).spans == (Span(0, 3, 0, 0), Span(3, 5, 0, 3))


@pytest.mark.parametrize("prefix", [[-1, 1], [1, -1], [-1, 2], [0, -1]])
def test_a_prefix_that_is_not_before_is_refused(prefix: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"prefix of segment \d: expected an earlier segment"):
        made([3, 2], prefix)


def test_a_prefix_with_a_prefix_is_refused() -> None:
    with pytest.raises(ShapeError, match="prefix of segment 2"):
        made([3, 2, 2], [-1, 0, 1])


def test_masks_by_hand() -> None:
    segments = made([2, 3], [-1, 0])
    assert segments.mask(0, 3, None) is None
    assert segments.mask(0, 3, 3) is None
    found = segments.mask(2, 3, None)
    assert found is not None
    assert found.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    found = segments.mask(1, 3, 2)
    assert found is not None
    assert found.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    found = segments.mask(0, 3, 2)
    assert found is not None
    assert found.int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_a_mask_is_made_once() -> None:
    segments = made([2, 3], [-1, 0])
    assert segments.mask(2, 3, None) is segments.mask(2, 3, None)
    assert segments.mask(2, 3, None) is not segments.mask(2, 3, 4)
