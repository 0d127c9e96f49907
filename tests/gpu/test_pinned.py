"""On CUDA: arrays in page-locked memory, and copies during which the process goes on."""

import gc

import numpy as np
import pytest
import torch

from stillroom.replay.batch import LAYOUT
from stillroom.replay.pinned import empty_for, on_device, pinned_empty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", sorted({dtype for _, dtype in LAYOUT.values()}, key=str))
def test_an_array_is_pinned_and_arrives(dtype: type) -> None:
    assert empty_for(DEVICE) is pinned_empty
    array = pinned_empty((3, 5), dtype)
    assert array.shape == (3, 5)
    assert array.dtype == np.dtype(dtype)
    assert torch.from_numpy(array).is_pinned()
    array[:] = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(on_device(array, DEVICE).cpu().numpy(), array)


def test_the_process_does_not_wait_for_a_copy() -> None:
    """And memory that is let go during the copy is not written to before its end."""
    array = pinned_empty((1 << 20,), np.int64)
    array[:] = np.arange(len(array))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]
        there = on_device(array, DEVICE)
        assert not stream.query(), "the copy is still to come"
        del array
        gc.collect()
        pinned_empty((1 << 20,), np.int64)[:] = -1
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(there.cpu(), torch.arange(1 << 20))
