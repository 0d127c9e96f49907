"""Where arrays of batches lie, and what arrives on a device."""

import numpy as np
import pytest
import torch

from stillroom.replay.batch import LAYOUT
from stillroom.replay.pinned import empty_for, on_device, pinned_empty

CPU = torch.device("cpu")


def test_only_a_gpu_needs_pinned_memory() -> None:
    """The device need not be there to be asked about."""
    assert empty_for(CPU) is None
    assert empty_for(torch.device("cuda", 1)) is pinned_empty


@pytest.mark.parametrize("dtype", sorted({dtype for _, dtype in LAYOUT.values()}, key=str))
def test_an_array_becomes_a_tensor_of_its_memory(dtype: type) -> None:
    array: np.ndarray = np.arange(6).astype(dtype).reshape(2, 3)
    tensor = on_device(array, CPU)
    assert tensor.numpy().dtype == array.dtype
    assert np.shares_memory(tensor.numpy(), array)
    np.testing.assert_array_equal(tensor.numpy(), array)
