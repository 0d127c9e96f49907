"""Reads TensorBoard's event files back as TensorBoard does."""

from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
    event_accumulator,
)


def points(folder: Path) -> dict[str, dict[int, float]]:
    """Each curve's values by step.

    Raises:
        AssertionError: a curve has two points at one step.
    """
    read = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            assert event.step not in found[name], f"two points of {name} at step {event.step}"
            found[name][event.step] = event.value
    return found
