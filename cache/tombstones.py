"""Tombstones: which shards' bytes `gc` has removed on purpose, or is about to remove.

A reader pins its snapshot first and looks for tombstones next; `gc` puts a tombstone first and
looks for pins next. So one of the two sees the other, and no reader loses bytes that it has opened.
Each run of `gc` puts tombstones of its own and takes back only those, so that runs do not rely on
one another. The tombstones of bytes that are gone stay.
"""

import re

from stillroom.cache import jsonfile
from stillroom.cache.part import NAME
from stillroom.cache.storage import Entry, Storage

FOLDER = "removed"
FILE = re.compile(rf"({NAME.pattern})\.(\d+)\.([0-9a-f]{{32}})\.json")


def tombstone_path(part: str, n: int, collector: str) -> str:
    """Object that says that the bytes of commit n of a part are removed.

    Args:
        part: the part.
        n: the commit.
        collector: random id of a run of `gc`, 32 hexadecimal digits.
    """
    return f"{FOLDER}/{part}.{n}.{collector}.json"


def put_tombstone(storage: Storage, part: str, n: int, collector: str) -> None:
    """Say that the bytes of a commit are going; readers that look from now on do not open them."""
    value = {"part": part, "n": n, "collector": collector}
    storage.put_new(tombstone_path(part, n, collector), jsonfile.dump_sealed(value))


def list_tombstones(storage: Storage) -> dict[tuple[str, int], list[Entry]]:
    """Tombstones by commit, (part, n)."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for entry in storage.list(FOLDER):
        match = FILE.fullmatch(entry.path.removeprefix(f"{FOLDER}/"))
        if match is not None:
            found.setdefault((match[1], int(match[4])), []).append(entry)
    return found


def removed_commits(storage: Storage) -> set[tuple[str, int]]:
    """Commits, (part, n), whose bytes `gc` has removed, or may be removing now."""
    return set(list_tombstones(storage))
