"""The object that maps ids: sealed, named by its hash, and nothing else is taken for one."""

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError
from stillroom.cache.id_map import IdMap, id_map_path, put_id_map, read_id_map
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.storage import Storage

MAP = IdMap(
    teacher_id=np.array([5, 0, 3, 1], np.uint32),
    teacher_vocab_size=7,
    tokenizer="s" * 32,
    teacher_tokenizer="t" * 32,
)


def packed(ids: list[int]) -> str:
    """Ids as the object holds them."""
    return base64.b64encode(zlib.compress(np.array(ids, "<u4").tobytes())).decode()


def changed(**changes: Any) -> bytes:
    """Its bytes with other values."""
    return jsonfile.dump_sealed(jsonfile.load_sealed(MAP.to_json(), "") | changes)


def test_round_trip() -> None:
    back = IdMap.from_json(MAP.to_json(), "here")
    assert back.to_json() == MAP.to_json()
    assert back.digest() == MAP.digest() == jsonfile.digest(MAP.to_json())
    assert back.teacher_id.tolist() == [5, 0, 3, 1]
    assert back.teacher_only.tolist() == [2, 4, 6]


def test_ids_there_and_back() -> None:
    ids = np.array([3, 0, UNUSED_ID], np.uint32)
    assert MAP.to_teacher(ids).tolist() == [1, 5, UNUSED_ID]
    found = MAP.to_student(np.array([1, 5, 2, 6, UNUSED_ID], np.uint32))
    assert found.tolist() == [3, 0, UNUSED_ID, UNUSED_ID, UNUSED_ID]
    assert found.dtype == np.uint32


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_id": packed([5, 0, 3])},
        {"teacher_id": packed([5, 0, 3, 1, 2])},
        {"teacher_id": packed([5, 0, 3, 7])},
        {"teacher_id": packed([5, 0, 3, 3])},
        {"teacher_id": packed([5, 0, 3, 1])[:-6]},
        {"teacher_id": "?"},
        {"teacher_id": packed([0] * 1_000_000)},
        {"vocab_size": 0},
        {"vocab_size": 2**40, "teacher_vocab_size": 2**41},
        {"teacher_vocab_size": 3},
        {"tokenizer": 1},
        {"other": 1},
    ],
)
def test_what_is_no_map_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"^here: "):
        IdMap.from_json(changed(**changes), "here")


def test_only_the_map_of_that_hash_is_read(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(MissingError, match="expected the map of the cache's ids"):
        read_id_map(storage, MAP.digest())
    put_id_map(storage, MAP)
    put_id_map(storage, MAP)
    assert read_id_map(storage, MAP.digest()).teacher_id.tolist() == [5, 0, 3, 1]
    storage.put_new(id_map_path("0" * 32), MAP.to_json())
    with pytest.raises(CorruptError, match=f"bytes of the hash {'0' * 32}"):
        read_id_map(storage, "0" * 32)
