"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillroom.train.durable import write_file, write_folder


def test_folder_appears_whole(tmp_path: Path) -> None:
    """The target is not there while it is filled, and nothing is left beside it."""
    target = tmp_path / "a" / "target"

    def fill(folder: Path) -> None:
        assert not target.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"x")

    write_folder(target, fill)
    assert (target / "sub" / "file").read_bytes() == b"x"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """An error while filling removes what was written."""

    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(b"x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(tmp_path / "target", fill)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_stays(tmp_path: Path) -> None:
    """The first folder of a name is kept."""
    for content in (b"first", b"second"):
        write_folder(tmp_path / "t", lambda f, c=content: (f / "x").write_bytes(c))  # type: ignore[misc]
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
