"""Steps as tensors: views of the stream's arrays, and copies in one block for another process."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from torch.utils.data import default_collate

from stillroom.cache.errors import ShapeError
from stillroom.cache.store import Cache
from stillroom.replay.batch import Batch, MicroBatch
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.stream import ReplayStream
from stillroom.replay.tensors import from_tensors, in_one_block, step_tensors


@pytest.fixture
def batch(scored_cache: Cache) -> Batch:
    """A step of several micro-batches, the last of which only keeps step."""
    config = StreamConfig(batch_rows=5, max_tokens=20)
    with ReplayStream(Source(scored_cache, scored_cache.snapshot()), config) as stream:
        made = stream.next_batch()
    micro = (*made.micro_batches, None)
    assert len(micro) > 2
    return replace(made, micro_batches=micro)


def test_tensors_are_views_of_the_arrays(batch: Batch) -> None:
    step = step_tensors(batch)
    assert (step["epoch"], step["first"]) == (batch.epoch, batch.first)
    assert step["num_positions"] == batch.num_positions
    assert tuple(step["rows"].tolist()) == batch.rows
    assert tuple(step["caches"].tolist()) == batch.caches
    assert step["micro_batches"][-1] is None
    for micro, tensors in zip(batch.micro_batches[:-1], step["micro_batches"], strict=False):
        assert micro is not None
        assert tensors is not None
        assert list(tensors) == [f.name for f in fields(MicroBatch)]
        back = from_tensors(tensors)
        for name, tensor in tensors.items():
            array = getattr(micro, name)
            assert tensor.numpy().dtype == array.dtype
            if array.size:
                assert np.shares_memory(tensor.numpy(), array)
                assert np.shares_memory(getattr(back, name), array)
            np.testing.assert_array_equal(getattr(back, name), array, strict=True)


def test_a_block_holds_copies_of_all_tensors(batch: Batch) -> None:
    step = step_tensors(batch)
    block = in_one_block(step)
    assert block.keys() == step.keys()
    assert (block["epoch"], block["first"]) == (step["epoch"], step["first"])
    assert block["num_positions"] == step["num_positions"]
    assert block["micro_batches"][-1] is None
    pairs = [(block["rows"], step["rows"]), (block["caches"], step["caches"])]
    for copied, micro in zip(block["micro_batches"], step["micro_batches"], strict=True):
        if copied is not None and micro is not None:
            assert list(copied) == list(micro)
            pairs += [(copied[name], micro[name]) for name in micro]
    for copy, tensor in pairs:
        assert copy.dtype == tensor.dtype
        np.testing.assert_array_equal(copy.numpy(), tensor.numpy(), strict=True)
    assert len({copy.untyped_storage().data_ptr() for copy, _ in pairs}) == 1
    assert pairs[0][0].is_shared()  # type: ignore[no-untyped-call]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in pairs if t.nbytes)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_steps_that_a_loader_put_together_are_refused(batch: Batch) -> None:
    """The default of a DataLoader is a batch of one step."""
    step = step_tensors(replace(batch, micro_batches=batch.micro_batches[:1]))
    together = default_collate([step])
    with pytest.raises(ShapeError, match=r"expected one axis; got shape .*batch_size=None"):
        from_tensors(together["micro_batches"][0])
