"""The contract of a shard format, as checks that raise AssertionError where a format breaks it.

A test of a format runs each of `CHECKS` on it; nothing touches the disk, and pytest is not needed:

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        check(MyFormat())

`testing_shard` has what the checks are made of, for further tests of one format.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from stillroom.cache.shard_format import ShardFormat
from stillroom.cache.testing_damage import (
    check_cut_off,
    check_damage,
    check_hostile_bytes,
    check_other_attributes,
    check_other_counts,
    check_other_manifest,
)
from stillroom.cache.testing_shard import (
    SMALL,
    Stored,
    expect,
    expect_same,
    make_attributes,
    random_stored,
)

SHARDS: dict[str, dict[str, Any]] = {
    "one position": SMALL | {"positions": 1, "sequences": 1, "topk": 1, "vocab_size": 2},
    "one sequence": {"positions": 300, "sequences": 1, "topk": 7, "vocab_size": 50},
    "P = S": SMALL | {"positions": 30, "sequences": 30},
    "P = S + 1": SMALL | {"positions": 31, "sequences": 30},
    "K = V": SMALL | {"topk": 90, "mass": False, "strange": False},
    "K = V, cut off by mass": SMALL | {"topk": 90, "strange": False},
    "ids below 2^24": SMALL | {"vocab_size": 2**24},
    "ids from 2^24 on": SMALL | {"vocab_size": 2**24 + 1},
    "ids from 2^31 on": SMALL | {"vocab_size": 2**31 + 1},
    "ids below 2^32 - 1": SMALL | {"vocab_size": 2**32 - 1},
    "no prompts of the teacher's": SMALL | {"teacher_prompts": False},
    "everything": SMALL,
    "K = 128": {"positions": 700, "sequences": 3, "topk": 128, "vocab_size": 200_000},
    "2,047 positions": SMALL | {"positions": 2047},
    "2,048 positions": SMALL | {"positions": 2048},
    "2,049 positions": SMALL | {"positions": 2049, "sequences": 2048},
    "70,000 positions": SMALL | {"positions": 70_000, "sequences": 90, "topk": 2, "extra": 0},
}


def check_round_trip(form: ShardFormat) -> None:
    """Every column comes back to the bit, and every attribute."""
    for seed, (name, settings) in enumerate(SHARDS.items()):
        stored = random_stored(form, seed, **settings)
        expect_same(stored.read_all(), stored.arrays, name)
        given = make_attributes(stored.arrays, stored.source.identity)
        kept = {key: stored.encoded.attributes.get(key) for key in given}
        expect(kept == given, f"{name}: attributes {given}, not {kept}")


def check_equal_bytes(form: ShardFormat) -> None:
    """Equal arrays give equal bytes, whatever their order and layout in memory; they are left as
    they are."""
    first = random_stored(form)
    before = {name: array.tobytes() for name, array in first.arrays.items()}
    attributes = make_attributes(first.arrays, first.source.identity)
    again = form.encode(first.arrays, attributes)
    expect(again == first.encoded, "the same arrays, encoded twice, give one result")
    other = {name: np.asfortranarray(array) for name, array in reversed(first.arrays.items())}
    for array in other.values():
        array.setflags(write=False)
    expect(form.encode(other, attributes) == first.encoded, "order and layout do not matter")
    after = {name: array.tobytes() for name, array in first.arrays.items()}
    expect(after == before, "encoding changes no array")


def check_ranges(form: ShardFormat) -> None:
    """Any ranges of any columns, in one read, are slices of what was encoded."""
    stored = random_stored(form, positions=5000, sequences=70)
    rng = np.random.default_rng(0)
    reader = stored.open()
    for number in range(60):
        spans = [_random_span(rng, stored) for _ in range(rng.integers(0, 9))]
        found = (stored.open() if number % 3 == 0 else reader).read_ranges(spans)
        expect(len(found) == len(spans), f"{spans}: an array each")
        for (name, start, stop), array in zip(spans, found, strict=True):
            wanted = stored.arrays[name][start:stop]
            expect_same({name: array}, {name: wanted}, f"rows {start} to {stop} of {spans}")


def check_requests(form: ShardFormat) -> None:
    """Opening reads nothing; a read is one request for ranges, the first at most two; a few
    positions do not cost the whole object."""
    stored = random_stored(form, positions=20_000, sequences=40)
    reader = stored.open()
    expect(not stored.storage.reads, "nothing is read when a shard is opened")
    few = [(name, 0, min(10, len(array))) for name, array in stored.arrays.items()]
    reader.read_ranges(few)
    expect(len(stored.storage.reads) <= 2, "the first read is at most two requests")
    bytes_read = sum(length for ranges in stored.storage.reads for _, length in ranges)
    expect(bytes_read <= len(stored.encoded.data) // 2, f"{bytes_read} bytes for ten rows")
    for spans in (few, [(name, 0, len(array)) for name, array in stored.arrays.items()]):
        stored.storage.reads.clear()
        reader.read_ranges(spans)
        expect(len(stored.storage.reads) == 1, "a further read is one request")


CHECKS: tuple[Callable[[ShardFormat], None], ...] = (
    check_round_trip,
    check_equal_bytes,
    check_ranges,
    check_requests,
    check_damage,
    check_cut_off,
    check_other_counts,
    check_other_manifest,
    check_other_attributes,
    check_hostile_bytes,
)
"""All of the contract."""


def _random_span(rng: np.random.Generator, stored: Stored) -> tuple[str, int, int]:
    name = str(rng.choice(sorted(stored.arrays)))
    rows = len(stored.arrays[name])
    start, stop = sorted(rng.integers(0, rows + 1, 2).tolist())
    if rng.random() < 0.5:
        stop = min(stop, start + 3)
    return name, start, stop
