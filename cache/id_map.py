"""Maps from a student's token ids to those of a teacher that knows the same tokens by other ids: an
object of the cache, named by its hash, which stands in the identity.

Rollouts and scores of such a cache are in the student's ids. The teacher reads mapped ids, and its
scores are mapped back.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.schema import UNUSED_ID

if TYPE_CHECKING:
    from stillroom.cache.storage import Storage

MAX_BYTES = 32 << 20
MAX_IDS = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class IdMap:
    """For each id of a student's vocabulary the teacher's id of the same token, another for each
    one."""

    teacher_id: np.ndarray
    """(V,) uint32: by student id."""
    teacher_vocab_size: int
    """The teacher's largest id + 1."""
    tokenizer: str
    """Fingerprint of the student's tokenizer."""
    teacher_tokenizer: str
    """Fingerprint of the teacher's."""

    @property
    def vocab_size(self) -> int:
        """V, ids of the student."""
        return len(self.teacher_id)

    @property
    def teacher_only(self) -> np.ndarray:
        """(n,) uint32: the teacher's ids that are no token of the student, ascending."""
        every = np.arange(self.teacher_vocab_size, dtype=np.uint32)
        return np.setdiff1d(every, self.teacher_id, assume_unique=True)

    def to_teacher(self, student_id: np.ndarray) -> np.ndarray:
        """The teacher's ids of the student's, uint32 of the same shape; UNUSED_ID stays."""
        unused = student_id == UNUSED_ID
        found = self.teacher_id[np.where(unused, 0, student_id).astype(np.int64)]
        return np.where(unused, UNUSED_ID, found).astype(np.uint32)

    def to_student(self, teacher_id: np.ndarray) -> np.ndarray:
        """The student's ids of the teacher's, uint32 of the same shape; UNUSED_ID stays, and stands
        for what the student does not have."""
        back = np.full(self.teacher_vocab_size + 1, UNUSED_ID, np.uint32)
        back[self.teacher_id] = np.arange(self.vocab_size, dtype=np.uint32)
        found: np.ndarray = back[np.minimum(teacher_id, self.teacher_vocab_size).astype(np.int64)]
        return found

    def to_json(self) -> bytes:
        """Canonical bytes, as stored."""
        packed = zlib.compress(self.teacher_id.astype("<u4").tobytes(), 9)
        return jsonfile.dump_sealed(
            {
                "teacher_id": base64.b64encode(packed).decode(),
                "teacher_tokenizer": self.teacher_tokenizer,
                "teacher_vocab_size": self.teacher_vocab_size,
                "tokenizer": self.tokenizer,
                "vocab_size": self.vocab_size,
            }
        )

    def digest(self) -> str:
        """Hash of the canonical bytes."""
        return jsonfile.digest(self.to_json())

    @staticmethod
    def from_json(data: bytes, where: str) -> "IdMap":
        """Parse a stored map.

        Raises:
            CorruptError: it is not one, or gives two ids of the student the same one.
        """
        stored: _Stored = jsonfile.build(
            _Stored, jsonfile.load_sealed(data, where, MAX_BYTES), where
        )
        try:
            found = _unpack(stored)
        except (ValueError, zlib.error) as error:
            do = "Restore the file."
            raise CorruptError(where, "a map of ids", f"no usable {error}", do) from error
        return IdMap(
            teacher_id=found,
            teacher_vocab_size=stored.teacher_vocab_size,
            tokenizer=stored.tokenizer,
            teacher_tokenizer=stored.teacher_tokenizer,
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    teacher_id: str
    teacher_tokenizer: str
    teacher_vocab_size: int
    tokenizer: str
    vocab_size: int


def id_map_path(digest: str) -> str:
    """Object of a map."""
    return f"id_maps/{digest}.json"


def put_id_map(storage: "Storage", id_map: IdMap) -> None:
    """Store a map; equal ones have the same object."""
    storage.put_new(id_map_path(id_map.digest()), id_map.to_json())


def read_id_map(storage: "Storage", digest: str) -> IdMap:
    """Read the map that an identity names.

    Raises:
        MissingError: it is not there.
        CorruptError: it is another one, or damaged.
    """
    path = id_map_path(digest)
    where = storage.describe(path)
    try:
        data = storage.get(path, MAX_BYTES)
    except MissingError as error:
        do = "Restore the file, or name the same teacher and student to 'stillroom init' again."
        raise MissingError(where, "the map of the cache's ids", "none", do) from error
    if jsonfile.digest(data) != digest:
        got = jsonfile.digest(data)
        raise CorruptError(where, f"bytes of the hash {digest}", got, "Restore the file.")
    return IdMap.from_json(data, where)


def _unpack(stored: _Stored) -> Any:
    sizes = (stored.vocab_size, stored.teacher_vocab_size)
    if not 1 <= sizes[0] <= sizes[1] <= MAX_IDS:
        raise ValueError(f"vocabularies of {sizes}")
    size_bytes = 4 * stored.vocab_size
    packed = base64.b64decode(stored.teacher_id, validate=True)
    data = zlib.decompressobj().decompress(packed, size_bytes + 1)
    if len(data) != size_bytes:
        raise ValueError(f"{len(data)} bytes of ids, not {size_bytes}")
    found = np.frombuffer(data, "<u4").astype(np.uint32)
    if found.max() >= stored.teacher_vocab_size or len(np.unique(found)) != len(found):
        raise ValueError("ids that are none of the teacher's, or come twice")
    return found
