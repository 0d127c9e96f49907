"""What a batch holds, as hashes: of every array of its micro-batches, and of every row, whatever
that was packed with."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.testing_shard import expect
from stillroom.replay.batch import Batch, MicroBatch

NAMES = tuple(f.name for f in fields(MicroBatch))
OF_POSITION = NAMES[NAMES.index("sampled_id") :]
"""Arrays that say the same of a position whatever its row was packed with."""

Held = tuple[int, int, str]
"""A row's cache, its number in that one's snapshot, and the hash of its tokens and scores."""


@dataclass(frozen=True, slots=True)
class Record:
    """One rank's share of one step."""

    epoch: int
    first: int
    rows: tuple[int, ...]
    caches: tuple[int, ...]
    num_positions: int
    micro_batches: tuple[dict[str, str] | None, ...]
    """Of each micro-batch the hash of every array, its dtype and shape; None for an empty one."""
    held: tuple[Held, ...]
    """Rows of this rank, sorted."""


def record(batch: Batch) -> Record:
    """What a batch holds."""
    packed = [micro for micro in batch.micro_batches if micro is not None]
    return Record(
        epoch=batch.epoch,
        first=batch.first,
        rows=batch.rows,
        caches=batch.caches,
        num_positions=batch.num_positions,
        micro_batches=tuple(
            None
            if micro is None
            else {f.name: _hash(getattr(micro, f.name)) for f in fields(micro)}
            for micro in batch.micro_batches
        ),
        held=tuple(sorted(row for micro in packed for row in rows_held(micro))),
    )


def rows_held(micro: MicroBatch) -> Iterator[Held]:
    """The rows of a micro-batch, shared prompts put before each of theirs again and entries that
    only other rows use left out."""
    segments = np.setdiff1d(np.arange(len(micro.prefix)), micro.prefix)
    runs = _positions_of_rows(micro)
    got = f"{len(runs)} runs of positions in {len(segments)} rows"
    expect(len(runs) == len(segments), f"a micro-batch has {got}")
    for segment, positions in zip(segments.tolist(), runs, strict=True):
        prefix = int(micro.prefix[segment])
        tokens = [_tokens(micro, own) for own in (prefix, segment) if own >= 0]
        hashes = [_hash(np.concatenate(tokens)), _hash(_places(micro)[positions])]
        hashes += [_hash(_values(micro, name, positions)) for name in OF_POSITION]
        at = positions[0]
        yield int(micro.cache[at]), int(micro.row[at]), jsonfile.digest(jsonfile.dump(hashes))


def _positions_of_rows(micro: MicroBatch) -> list[np.ndarray]:
    place = _places(micro)
    is_new = place[1:] <= place[:-1]
    for of_row in (micro.row, micro.cache):
        is_new |= of_row[1:] != of_row[:-1]
    return np.split(np.arange(len(place)), np.flatnonzero(is_new) + 1)


def _places(micro: MicroBatch) -> np.ndarray:
    """(P,) where in its row the token is that predicts a position."""
    return np.asarray(micro.position_id[micro.predict_index])


def _tokens(micro: MicroBatch, segment: int) -> np.ndarray:
    return micro.token[micro.row_start[segment] : micro.row_start[segment + 1]]


def _values(micro: MicroBatch, name: str, positions: np.ndarray) -> np.ndarray:
    values = getattr(micro, name)[positions]
    if values.ndim == 1:
        return np.asarray(values)
    ids = getattr(micro, f"{name.partition('_')[0]}_id")[positions]
    used = np.flatnonzero((ids >= 0).any(axis=0))
    return np.asarray(values[:, : used[-1] + 1 if len(used) else 0])


def _hash(array: np.ndarray) -> str:
    return (
        f"{array.dtype}{list(array.shape)} {jsonfile.digest(np.ascontiguousarray(array).tobytes())}"
    )
