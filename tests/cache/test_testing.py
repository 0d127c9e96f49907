"""The contract finds what breaks it: a reader or a writer that is wrong in one way fails the check
that is for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import Chunk
from stillroom.cache.schema import UNUSED_ID, Arrays
from stillroom.cache.shard_format import Encoded, ShardFormat, Source
from stillroom.cache.testing import (
    check_equal_bytes,
    check_ranges,
    check_requests,
    check_round_trip,
)
from stillroom.cache.testing_damage import (
    check_damage,
    check_hostile_bytes,
    check_other_attributes,
    check_other_counts,
    check_other_manifest,
)
from stillroom.cache.zarr_format import Span, ZarrFormat, ZarrReader


class Trusting(Source):
    """Verifies nothing."""

    def fetch(self, chunks: Sequence[tuple[str, Chunk]]) -> list[bytes]:
        """Bytes as they come."""
        starts, lengths = [c.offset for _, c in chunks], [c.length for _, c in chunks]
        return self.storage.get_ranges(self.path, starts, lengths)


class Plain(ZarrReader):
    """A reader whose results pass through `changed`."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """Read, and change."""
        return [
            self.changed(array, name)
            for array, (name, _, _) in zip(super().read_ranges(wanted), wanted, strict=True)
        ]

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """What comes instead of an array."""
        return array


class OneNaN(Plain):
    """Knows one NaN."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """All of them."""
        if array.dtype.kind == "f":
            array[np.isnan(array)] = np.nan
        return array


class NoMinusZero(Plain):
    """Knows one zero."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """Zeros without a sign."""
        return np.where(array == 0, array.dtype.type(0), array)


class UnusedIsZero(Plain):
    """Fills unused entries with another id."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """Ids that are all in the vocabulary."""
        return np.where(array == UNUSED_ID, np.uint32(0), array) if name == "topk_id" else array


class Float32Ids(Plain):
    """Knows ids to 24 bits."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """Ids that passed through floats."""
        if name != "topk_id":
            return array
        used = array != UNUSED_ID
        rounded = np.where(used, array, 0).astype(np.float32).astype(np.uint64)
        return np.where(used, rounded, array).astype(np.uint32)


class Int32Ids(Plain):
    """Knows ids to 31 bits."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """Ids without their highest bit."""
        if name != "extra_id":
            return array
        return np.where(array == UNUSED_ID, array, array & np.uint32(0x7FFFFFFF))


class AlwaysTail(Plain):
    """Knows no distribution that is whole."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """A tail that is empty everywhere, filled."""
        is_whole = name == "tail_logprob" and np.isneginf(array).all()
        return np.full_like(array, -65504) if is_whole else array


class Wider(Plain):
    """Gives other dtypes."""

    def changed(self, array: np.ndarray, name: str) -> np.ndarray:
        """Codes as large numbers."""
        return array.astype(np.uint32) if array.dtype == np.uint16 else array


class FromTheStart(ZarrReader):
    """Reads too far back."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """As many rows as asked for."""
        return super().read_ranges([(name, 0, stop - start) for name, start, stop in wanted])


class OneByOne(ZarrReader):
    """Asks for each column."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """The right rows."""
        return [super(OneByOne, self).read_ranges([span])[0] for span in wanted]


class Eager(ZarrReader):
    """Reads when it is opened."""

    def __init__(self, source: Source) -> None:
        """Read."""
        super().__init__(source)
        self.read_ranges([("token", 0, 1)])


class Whole(ZarrReader):
    """Reads the whole object."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """The right rows."""
        self._source.storage.get(self._source.path)
        return super().read_ranges(wanted)


class Unverified(ZarrReader):
    """Compares no hash."""

    def __init__(self, source: Source) -> None:
        """Trust."""
        fields = {name: getattr(source, name) for name in Source.__dataclass_fields__}
        super().__init__(Trusting(**fields))


class AnyDtype(ZarrReader):
    """Looks at no entry."""

    def _check_entry(self, name: str, entry: object) -> None:
        """Nothing."""


class AnyShape(ZarrReader):
    """Takes the counts from the manifest, not from the commit."""

    def __init__(self, source: Source) -> None:
        """Believe that the commit says what the manifest does."""
        shapes = {name: entry.shape for name, entry in source.manifest.arrays.items()}
        commit = replace(
            source.commit,
            positions=shapes["sampled_logprob"][0],
            tokens=shapes["token"][0],
            rows=shapes["prompt_length"][0],
            teacher_prompt_tokens=shapes["teacher_prompt"][0],
        )
        super().__init__(replace(source, commit=commit))


class Gullible(ZarrReader):
    """Lets errors of attributes pass as they come."""

    def __init__(self, source: Source) -> None:
        """Calculate with them first."""
        attributes = source.manifest.attributes
        _ = attributes["id_groups"] * attributes["id_group_width"] + 1
        super().__init__(source)


class AnyError(ZarrReader):
    """Says nothing of where and why."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """The right rows."""
        try:
            return super().read_ranges(wanted)
        except CorruptError as error:
            raise ValueError(str(error)) from error


class Nameless(ZarrReader):
    """Says nothing of where."""

    def read_ranges(self, wanted: Sequence[Span]) -> list[np.ndarray]:
        """The right rows."""
        try:
            return super().read_ranges(wanted)
        except CorruptError as error:
            raise CorruptError("a shard", error.expected, error.got, error.do) from error


@dataclass
class Broken(ZarrFormat):
    """The Zarr format with another reader."""

    reader: type[ZarrReader]

    def open(self, source: Source) -> ZarrReader:
        """Open with it."""
        return self.reader(source)


READERS = [
    (OneNaN, check_round_trip),
    (NoMinusZero, check_round_trip),
    (UnusedIsZero, check_round_trip),
    (Float32Ids, check_round_trip),
    (Int32Ids, check_round_trip),
    (AlwaysTail, check_round_trip),
    (Wider, check_round_trip),
    (FromTheStart, check_ranges),
    (OneByOne, check_requests),
    (Eager, check_requests),
    (Whole, check_damage),
    (Unverified, check_damage),
    (Nameless, check_damage),
    (AnyDtype, check_other_manifest),
    (AnyShape, check_other_counts),
    (Gullible, check_other_attributes),
    (AnyError, check_hostile_bytes),
]


@pytest.mark.parametrize(("reader", "check"), READERS)
def test_a_wrong_reader_is_found(
    reader: type[ZarrReader], check: Callable[[ShardFormat], None]
) -> None:
    with pytest.raises(AssertionError):
        check(Broken(reader))


class Dated(ZarrFormat):
    """Encodes differently each time."""

    numbers: ClassVar = count()

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode with a number behind it."""
        encoded = super().encode(arrays, attributes)
        return replace(encoded, data=encoded.data + b"%d" % next(self.numbers))


class Ordered(ZarrFormat):
    """Looks at the order of columns."""

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode with the first column's name behind it."""
        encoded = super().encode(arrays, attributes)
        return replace(encoded, data=encoded.data + next(iter(arrays)).encode())


class Sorting(ZarrFormat):
    """Encodes in place."""

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode, then change."""
        encoded = super().encode(arrays, attributes)
        if arrays["topk_id"].flags.writeable:
            arrays["topk_id"].sort(axis=1)
        return encoded


class Forgetful(ZarrFormat):
    """Keeps only its own attributes."""

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode without the sampler."""
        return super().encode(arrays, {k: v for k, v in attributes.items() if k != "sampler"})


class Guessing(ZarrFormat):
    """Takes the axis of a user column from its length."""

    def encode(self, arrays: Arrays, attributes: dict[str, Any]) -> Encoded:
        """Encode with the first axis that fits."""
        sequences = len(arrays["prompt_length"])
        axes = {
            name: "sequence" if len(arrays[name]) == sequences else axis
            for name, axis in attributes["user_axes"].items()
        }
        return super().encode(arrays, attributes | {"user_axes": axes})


@pytest.mark.parametrize(
    ("form", "check"),
    [
        (Dated(), check_equal_bytes),
        (Ordered(), check_equal_bytes),
        (Sorting(), check_equal_bytes),
        (Forgetful(), check_round_trip),
        (Guessing(), check_round_trip),
    ],
)
def test_a_wrong_writer_is_found(form: ShardFormat, check: Callable[[ShardFormat], None]) -> None:
    with pytest.raises(AssertionError):
        check(form)
