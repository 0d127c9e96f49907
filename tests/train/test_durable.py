"""Folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from stillroom.cache.errors import CorruptError, StorageError
from stillroom.train.durable import remove, write_file, write_folder


def test_folder_appears_whole(tmp_path: Path) -> None:
    """The target is not there while it is filled, and nothing is left beside it."""
    parent = tmp_path / "a"

    def fill(folder: Path) -> str:
        assert not (parent / "target").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"x")
        return "target"

    assert write_folder(parent, fill) == parent / "target"
    assert (parent / "target" / "sub" / "file").read_bytes() == b"x"
    assert [p.name for p in parent.iterdir()] == ["target"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("disk full"),
        RuntimeError("disk full"),
        SafetensorError("disk full"),
        ValueError("not because the disk full"),
    ],
)
def test_failure_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    """An error while filling removes what was written, and names the place."""

    def fill(folder: Path) -> str:
        (folder / "file").write_bytes(b"x")
        raise error

    with pytest.raises(StorageError, match="disk full") as caught:
        write_folder(tmp_path, fill)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_our_own_errors_pass(tmp_path: Path) -> None:
    """What is wrong with the content is not said to be wrong with the disk."""

    def fill(folder: Path) -> str:
        raise CorruptError("x", "a", "b", "c")

    with pytest.raises(CorruptError):
        write_folder(tmp_path, fill)


def test_existing_folder_stays(tmp_path: Path) -> None:
    """The first folder of a name is kept."""

    def fill(folder: Path, content: bytes) -> str:
        (folder / "x").write_bytes(content)
        return "t"

    for content in (b"first", b"second"):
        write_folder(tmp_path, partial(fill, content=content))
    assert (tmp_path / "t" / "x").read_bytes() == b"first"


def test_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old content stays until the new one is on disk."""
    synced: list[int] = []
    real = os.fsync

    def counted(handle: int) -> None:
        synced.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", counted)
    write_file(tmp_path / "f", b"one")
    write_file(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert len(synced) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old content stays, and the error names the place."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_file(tmp_path / "f", b"one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"/f: .*No space left on device.*Make room"):
        write_file(tmp_path / "f", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"one"


def test_what_cannot_be_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone: expected to remove it"):
        remove(tmp_path / "gone")
