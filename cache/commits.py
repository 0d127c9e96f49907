"""Commits: which attempt is a part's shard.

A commit is one JSON object put if absent, so of any number of scorers one wins. A reply can be lost
after a put took effect; then the store says "exists" about our own bytes. So a commit carries its
attempt's random id, and after any answer but success it is read back: own id, won; another, lost;
absent, the same bytes are tried again. What is won by reading back is made durable first: the put
may have failed at just that.
"""

import base64
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, InputError, MissingError, StorageError
from stillroom.cache.part import NAME, policy_of
from stillroom.cache.schema import FORMAT_VERSION
from stillroom.cache.storage import Storage

RETRIES = 4
BACKOFF_S = 0.2
FILE = re.compile(r"(v\d{6,9}-[0-9a-f]{16})\.(0|[1-9]\d{0,8})\.json")
HASH = re.compile(r"[0-9a-f]{32}")
MAX_BYTES = 32 << 20
MAX_ROWS = 1 << 22
"""Far more than a part has: a table of zeros takes 50 MB from some 50 kB."""
MAX_COUNT = 1 << 48
"""Of tokens or bytes: far beyond any part, so that sums of many stay within 64 bits."""


@dataclass(frozen=True, kw_only=True)
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
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return jsonfile.dump_sealed(value)

    def digest(self) -> str:
        """Hash of the canonical bytes."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
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
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(base64.b64decode(self.row_table, validate=True), size + 1)
        except (zlib.error, ValueError) as error:
            raise self._bad_table(str(error)) from error
        if len(data) != size or not inflate.eof:
            raise self._bad_table(f"{len(data)} bytes")
        prompt, positions, others = np.frombuffer(data, "<u4").reshape(3, self.rows)
        used = prompt + positions
        tokens = used + others
        if (used < prompt).any() or (tokens < others).any():
            raise self._bad_table("a row of 2^32 tokens or more")
        sums = tokens.sum(dtype=np.uint64), positions.sum(dtype=np.uint64)
        if sums != (self.tokens, self.positions):
            raise self._bad_table("other sums")
        return np.stack([tokens, prompt, positions], axis=1, dtype=np.uint32)

    def _bad_table(self, got: str) -> CorruptError:
        where = f"commit {self.part}.{self.n}, row table"
        return CorruptError(
            where, f"{self.rows} rows of three lengths", got, "Score the part again."
        )


def encode_row_table(tokens: np.ndarray, prompt: np.ndarray, positions: np.ndarray) -> str:
    """Pack the three lengths of each row: base64 of zlib of three columns of uint32, which are
    prompt tokens, positions, and the completion tokens that are not scored.

    Raises:
        InputError: a row has fewer tokens than its prompt and its positions.
    """
    prompt, positions = prompt.astype(np.int64), positions.astype(np.int64)
    others = tokens.astype(np.int64) - prompt - positions
    if others.min(initial=0) < 0:
        row = int(others.argmin())
        got = f"{tokens[row]} in row {row}"
        raise InputError("row lengths", "prompt + positions tokens at least", got, "Report this.")
    table = np.stack([prompt, positions, others]).astype("<u4")
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
        InputError: no reader would take it: the part has too many rows.
        StorageError: the storage answers neither way; nothing is known, and nothing was deleted.
    """
    path, data = commit_path(commit.part, commit.n), commit.to_json()
    if commit.rows > MAX_ROWS or len(data) > MAX_BYTES:
        expected = f"a commit of at most {MAX_ROWS} rows and {MAX_BYTES} bytes"
        got = f"{commit.rows} rows, {len(data)} bytes"
        raise InputError(f"part {commit.part}", expected, got, "Make smaller parts.")
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
            won = read_commit(storage, path).attempt == commit.attempt
            if won:
                storage.make_durable(path)
            return won
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
    return decode_commit(storage.get(path, MAX_BYTES), path, storage.describe(path))


def decode_commit(data: bytes, path: str, where: str) -> Commit:
    """Parse and check the bytes of a commit.

    Args:
        data: what is stored.
        path: object that must hold it.
        where: named by the error.

    Raises:
        CorruptError: it is not a commit, or not the one that the path says.
    """
    commit: Commit = jsonfile.build(Commit, jsonfile.load_sealed(data, where, MAX_BYTES), where)
    expected, got = _problem(commit, path, data)
    if expected:
        raise CorruptError(where, expected, got, "Restore the file.")
    return commit


def _problem(commit: Commit, path: str, data: bytes) -> tuple[str, str]:
    """What is wrong with a commit, as (expected, got); empty if nothing is."""
    if commit.format_version != FORMAT_VERSION:
        return f"a commit of format {FORMAT_VERSION}", f"{commit.format_version}"
    if not NAME.fullmatch(commit.part) or commit_path(commit.part, commit.n) != path:
        return "the commit that its name says", f"{commit.part:.40}.{commit.n}"
    for name in ("attempt", "identity", "manifest_hash", "rollouts_hash"):
        if not HASH.fullmatch(getattr(commit, name)):
            return f"32 hexadecimal digits of {name}", f"{getattr(commit, name)!r:.80}"
    if not (0 <= commit.rows <= min(commit.positions, MAX_ROWS)):
        return f"0 to {MAX_ROWS} rows with a position each", f"{commit.rows}, {commit.positions}"
    if not commit.rows + commit.positions <= commit.tokens <= MAX_COUNT:
        expected = f"tokens for {commit.rows} prompts and {commit.positions} positions"
        return expected, f"{commit.tokens}"
    others = (commit.teacher_prompt_tokens, commit.stored_bytes, commit.teacher_s)
    if not 0 <= min(others) <= max(others) <= MAX_COUNT:
        return f"counts from 0 to {MAX_COUNT}", f"{others}"
    if commit.digest() != jsonfile.digest(data):
        return "canonical JSON", "the same values in other bytes"
    return "", ""


def list_commits(storage: Storage) -> dict[str, int]:
    """Live commits: part to n, as in `live_numbers`."""
    names = (entry.path.rsplit("/", 1)[1] for entry in storage.list("quarantine"))
    matches = (FILE.fullmatch(name) for name in names)
    aside = {(match[1], int(match[2])) for match in matches if match}
    return live_numbers(list_numbers(storage), aside)


def list_numbers(storage: Storage, prefix: str = "commits") -> dict[str, list[int]]:
    """Every n of each part's commits, those in quarantine too."""
    found: dict[str, list[int]] = defaultdict(list)
    for entry in storage.list(prefix):
        match = FILE.fullmatch(entry.path.rsplit("/", 1)[1])
        if match is not None and entry.path == commit_path(match[1], int(match[2])):
            found[match[1]].append(int(match[2]))
    return dict(found)


def live_numbers(
    numbers: Mapping[str, Collection[int]], aside: Container[tuple[str, int]]
) -> dict[str, int]:
    """The live commit of each part: that of the first n that is not in quarantine. A part without
    that commit has none, whatever stands behind it.

    Args:
        numbers: every n of each part's commits.
        aside: commits in quarantine, (part, n).
    """
    first = {part: first_free(part, aside) for part in numbers}
    return {part: n for part, n in first.items() if n in numbers[part]}


def first_free(part: str, aside: Container[tuple[str, int]]) -> int:
    """The first n of a part that is not in quarantine."""
    return next(n for n in count() if (part, n) not in aside)
