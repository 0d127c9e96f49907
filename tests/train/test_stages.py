"""Stage records: work is done once, and again when what it left is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage
from stillroom.train.stages import StageLog


def test_work_is_done_once(tmp_path: Path) -> None:
    """A finished stage is not run again, until an object that it left is missing."""
    storage = Storage(tmp_path / "root")
    calls: list[int] = []

    def work() -> tuple[list[tuple[str, str]], dict[str, Any]]:
        calls.append(1)
        storage.put_new("rollouts/x", b"1")
        return [(str(tmp_path / "root"), "rollouts/x")], {"rows": 3}

    log = StageLog(tmp_path / "stages")
    assert log.finished("a") is None
    first = log.run("a", work)
    second = StageLog(tmp_path / "stages").run("a", work)
    assert first == second
    assert second.values == {"rows": 3}
    assert len(calls) == 1
    (tmp_path / "root" / "rollouts" / "x").unlink()
    assert log.finished("a") is None
    log.run("a", work)
    assert len(calls) == 2


def test_rollouts_that_were_retired_may_be_gone(tmp_path: Path) -> None:
    """`gc` removes them; the stage that made them is not done again."""
    storage = Storage(tmp_path / "root")
    parts = [f"v000000-{unit:016x}" for unit in range(2)]
    objects = [(str(tmp_path / "root"), f"rollouts/{part}.parquet") for part in parts]
    for _, path in objects:
        storage.put_new(path, b"1")
    log = StageLog(tmp_path / "stages")
    log.run("a", lambda: (objects, {}))
    storage.delete(objects[0][1])
    storage.put_new(f"retired/{parts[1]}.json", b"1")
    assert log.finished("a") is None
    storage.put_new(f"retired/{parts[0]}.json", b"1")
    assert log.finished("a") is not None


@pytest.mark.parametrize("objects", [b"[[]]", b"1", b"[1]", b'[["a","b","c"]]'])
def test_a_damaged_record_is_refused(tmp_path: Path, objects: bytes) -> None:
    record = b'{"objects":%s,"seconds":1.0,"values":{}}' % objects
    (tmp_path / "a.json").write_bytes(record)
    with pytest.raises(CorruptError, match=r"a\.json: expected the record of a stage"):
        StageLog(tmp_path).finished("a")
