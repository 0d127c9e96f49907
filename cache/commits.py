"""Commits: which attempt is a part's shard.

A commit is one JSON object put if absent, so of any number of scorers one wins. A reply can be lost
after a put took effect; then the store says "exists" about our own bytes. So a commit carries its
attempt's random id, and after any answer but success it is read back: own id, won; another, lost;
absent, the same bytes are tried again.
"""

import base64
import re
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MissingError, StorageError
from stillroom.cache.part import NAME, policy_of
from stillroom.cache.schema import FORMAT_VERSION
from stillroom.cache.storage import Storage

RETRIES = 4
BACKOFF_S = 0.2
FILE = re.compile(r"(v\d{6,9}-[0-9a-f]{16})\.(\d+)\.json")
ATTEMPT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One attempt made a part's shard."""

    part: str
    n: int
    """0 unless an earlier commit of the part was quarantined."""
    attempt: str
    """32 random hexadecimal digits."""
    identity: str
    """Digest of the cache's identity."""
    manifest_hash: str
    rollouts_hash: str
    """xxh3-128 of the part's Parquet file, as it was scored."""
    rows: int
    positions: int
    tokens: int
    teacher_prompt_tokens: int
    stored_bytes: int
    """Bytes of the shard's object and manifest."""
    teacher_s: float
    """Seconds that the teacher took for it."""
    scorer: dict[str, Any]
    """Host, process, engine, device, time."""
    row_table: str
    """Per row: tokens, prompt tokens, positions (see `row_lengths`)."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return jsonfile.dump(asdict(self))

    def digest(self) -> str:
        """Hash of the canonical bytes."""
        return jsonfile.digest(self.to_json())

    @property
    def policy_version(self) -> int:
        """Policy that sampled the part."""
        return policy_of(self.part)

    def row_lengths(self) -> np.ndarray:
        """(rows, 3) uint32: tokens, prompt tokens and positions of each row.

        Raises:
            CorruptError: the table does not fit the commit.
        """
        size = self.rows * 12
        try:
            data = zlib.decompressobj().decompress(base64.b64decode(self.row_table), size + 1)
        except (zlib.error, ValueError) as error:
            raise self._bad_table(str(error)) from error
        if len(data) != size:
            raise self._bad_table(f"{len(data)} bytes")
        table = np.frombuffer(data, "<u4").reshape(self.rows, 3)
        if table[:, 0].sum() != self.tokens or table[:, 2].sum() != self.positions:
            raise self._bad_table("other sums")
        return table

    def _bad_table(self, got: str) -> CorruptError:
        where = f"commit {self.part}.{self.n}, row table"
        return CorruptError(
            where, f"{self.rows} rows of three lengths", got, "Score the part again."
        )


def encode_row_table(tokens: np.ndarray, prompt: np.ndarray, positions: np.ndarray) -> str:
    """Pack the three lengths of each row."""
    table = np.stack([tokens, prompt, positions], axis=1).astype("<u4")
    return base64.b64encode(zlib.compress(table.tobytes(), 9)).decode()


def attempt_path(part: str, attempt: str) -> str:
    """Folder of an attempt."""
    return f"scores/{part}/{attempt}"


def commit_path(part: str, n: int) -> str:
    """Object of a commit; commits of one policy share a prefix, so that listings stay short."""
    return f"commits/v{policy_of(part):06d}/{part}.{n}.json"


def put_commit(storage: Storage, commit: Commit) -> bool:
    """Make an attempt the part's shard, unless another one is.

    Returns:
        Whether this attempt won.

    Raises:
        StorageError: the storage answers neither way; nothing is known, and nothing was deleted.
    """
    path, data = commit_path(commit.part, commit.n), commit.to_json()
    failure: StorageError | None = None
    for attempt in range(RETRIES):
        if attempt:
            time.sleep(BACKOFF_S * 2**attempt)
        try:
            if storage.put_new(path, data):
                return True
        except StorageError as error:
            failure = error
        try:
            return read_commit(storage, path).attempt == commit.attempt
        except MissingError:
            continue
        except StorageError as error:
            failure = error
    if failure is None:
        do = "Check the storage's consistency."
        failure = StorageError(storage.describe(path), "a commit after it was put", "none", do)
    raise failure


def read_commit(storage: Storage, path: str) -> Commit:
    """Read a commit.

    Raises:
        CorruptError: it is not a commit, or not the one that its name says.
    """
    where = storage.describe(path)
    commit: Commit = jsonfile.build(Commit, jsonfile.load(storage.get(path), where), where)
    if commit.format_version != FORMAT_VERSION or not ATTEMPT.fullmatch(commit.attempt):
        raise CorruptError(
            where, f"a commit of format {FORMAT_VERSION}", "another", "Restore the file."
        )
    if min(commit.rows, commit.positions, commit.tokens, commit.teacher_prompt_tokens) < 0:
        raise CorruptError(where, "counts from 0", "a negative one", "Restore the file.")
    if not NAME.fullmatch(commit.part) or commit_path(commit.part, commit.n) != path:
        raise CorruptError(
            where, "the commit that its name says", f"{commit.part}.{commit.n}", "Restore it."
        )
    return commit


def list_commits(storage: Storage) -> dict[str, int]:
    """Live commits: part to n. Quarantined ones are left out."""
    found: dict[str, int] = {}
    quarantined = {entry.path.rsplit("/", 1)[1] for entry in storage.list("quarantine")}
    for entry in storage.list("commits"):
        name = entry.path.rsplit("/", 1)[1]
        match = FILE.fullmatch(name)
        if match and name not in quarantined:
            found[match[1]] = max(found.get(match[1], 0), int(match[2]))
    return found
