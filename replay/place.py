"""Where a stream stands in its epochs, and which part of them a step takes. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

LAST_BATCHES = ("keep", "drop", "carry")
"""What happens to rows at an epoch's end that fill no batch: they come as a short one, are left out
of that epoch (one of less than a batch is a short one), or are filled up from the next epoch."""


@dataclass(frozen=True, slots=True)
class Place:
    """Before the row `first` of an epoch."""

    epoch: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start to stop, the last excluded, of an epoch."""

    epoch: int
    start: int
    stop: int


def next_step(
    place: Place, batch: int, rows_in: Callable[[int], int], last_batch: str
) -> tuple[list[Span], Place]:
    """What one step takes.

    Args:
        place: where the stream stands.
        batch: rows of a step.
        rows_in: rows of an epoch, by its number; >= 1.
        last_batch: one of LAST_BATCHES.

    Returns:
        The spans, in order, and the place after them. Only "carry" gives more than one span.
    """
    epoch, first = place.epoch, place.first
    if first and _is_over(rows_in(epoch) - first, batch, last_batch):
        epoch, first = epoch + 1, 0
    spans: list[Span] = []
    wanted = batch
    while wanted:
        stop = min(first + wanted, rows_in(epoch))
        spans.append(Span(epoch, first, stop))
        wanted -= stop - first
        over = _is_over(rows_in(epoch) - stop, batch, last_batch)
        epoch, first = (epoch + 1, 0) if over else (epoch, stop)
        if last_batch != "carry":
            break
    return spans, Place(epoch, first)


def after_steps(place: Place, steps: int, batch: int, rows: int, last_batch: str) -> Place:
    """The place after so many steps, where every epoch has the same number of rows."""
    if last_batch == "carry":
        epochs, first = divmod(place.first + steps * batch, rows)
        return Place(place.epoch + epochs, first)
    if place.first and _is_over(rows - place.first, batch, last_batch):
        place = Place(place.epoch + 1, 0)
    left = steps_in(rows - place.first, batch, last_batch)
    if steps < left:
        return Place(place.epoch, place.first + steps * batch)
    epochs, more = divmod(steps - left, steps_in(rows, batch, last_batch))
    return Place(place.epoch + 1 + epochs, more * batch)


def steps_in(rows: int, batch: int, last_batch: str) -> int:
    """Steps in which an epoch of so many rows goes by; for "carry" rounded up."""
    return max(1, rows // batch) if last_batch == "drop" else -(-rows // batch)


def _is_over(left: int, batch: int, last_batch: str) -> bool:
    return left <= 0 or (last_batch == "drop" and left < batch)
