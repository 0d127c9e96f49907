"""`Cache`: one root with its identity, its parts, its commits, and the shards that readers open."""

import os
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.commits import (
    Commit,
    attempt_path,
    commit_path,
    encode_row_table,
    list_commits,
    put_commit,
    read_commit,
)
from stillroom.cache.errors import MismatchError, MissingError
from stillroom.cache.identity import Identity
from stillroom.cache.manifest import OBJECT_NAME, Manifest
from stillroom.cache.part import NAME, PartMeta, decode_part, encode_part, part_name
from stillroom.cache.schema import USER_PREFIX, Arrays, check_arrays
from stillroom.cache.shard import Shard
from stillroom.cache.snapshot import Snapshot, make_snapshot, open_snapshot
from stillroom.cache.storage import Storage

IDENTITY_PATH = "cache.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBy:
    """How a shard was made; goes into its commit."""

    teacher_s: float
    """Seconds that the teacher took."""
    scorer: dict[str, Any]
    """Host, process, numeric class, time."""


class Cache:
    """A cache of teacher scores.

    Make one with `Cache.create`, or open an existing one with `Cache.open`.
    """

    def __init__(self, storage: Storage, identity: Identity) -> None:
        """Bind a storage to the identity that it holds."""
        self.storage = storage
        self.identity = identity

    @classmethod
    def create(cls, root: str | os.PathLike[str], identity: Identity) -> "Cache":
        """Make a cache, or open the one that is there if its identity is the same.

        Raises:
            StorageError: the root cannot be written, or ignores put-if-absent.
            MismatchError: the root holds a cache with another identity.
        """
        storage = Storage(root)
        if not storage.exists(IDENTITY_PATH):
            storage.probe()
            storage.put_new(IDENTITY_PATH, identity.to_json())
        cache = cls.open(root)
        cache.identity.check_same(identity, storage.describe(IDENTITY_PATH))
        return cache

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> "Cache":
        """Open an existing cache.

        Raises:
            MissingError: there is none.
            MismatchError: it was written by another format version.
        """
        storage = Storage(root)
        where = storage.describe(IDENTITY_PATH)
        try:
            data = storage.get(IDENTITY_PATH)
        except MissingError as error:
            do = "Check the root, or make a cache with 'stillroom init'."
            raise MissingError(where, "a cache", "no cache.json", do) from error
        return cls(storage, Identity.from_json(data, where))

    def parts(self) -> list[str]:
        """Names of all parts, scored or not, oldest policy first."""
        names = (
            e.path.removeprefix("rollouts/").removesuffix(".parquet")
            for e in self.storage.list("rollouts")
        )
        return sorted(name for name in names if NAME.fullmatch(name))

    def has_part(self, policy_version: int, unit: str) -> bool:
        """Whether the rollouts of a unit are there."""
        return self.storage.exists(_part_path(part_name(policy_version, unit)))

    def add_part(self, table: pa.Table, meta: PartMeta) -> bool:
        """Store rollouts as a part, unless the unit has one already.

        Returns:
            False if a part of that name exists; its bytes stay as they are.

        Raises:
            InputError: a row cannot be scored.
            MismatchError: the rollouts were tokenised with another tokenizer.
        """
        self._check_meta(meta.name, meta)
        data = encode_part(table, meta, self.identity.max_length)
        return self.storage.put_new(_part_path(meta.name), data)

    def read_part(self, part: str) -> tuple[pa.Table, PartMeta, str]:
        """Rollouts of a part, what is true of all of them, and the hash of its bytes.

        Raises:
            MissingError: there is no such part.
            CorruptError: it cannot be read.
            MismatchError: it is another part, or was tokenised with another tokenizer.
        """
        path = _part_path(part)
        data = self.storage.get(path)
        table, meta = decode_part(data, self.storage.describe(path))
        self._check_meta(part, meta)
        return table, meta, jsonfile.digest(data)

    def commits(self) -> dict[str, int]:
        """Live commits: part to n."""
        return list_commits(self.storage)

    def commit_of(self, part: str) -> Commit:
        """The live commit of a part.

        Raises:
            MissingError: the part is not scored.
        """
        n = self.commits().get(part)
        if n is None:
            raise MissingError(
                f"part {part}", "a commit", "none", "Score it with 'stillroom score'."
            )
        return read_commit(self.storage, commit_path(part, n))

    def is_scored(self, part: str) -> bool:
        """Whether a part has a live commit; asks for one object only."""
        return self.storage.exists(commit_path(part, self._next_n(part)))

    def quarantine(self, part: str, reason: str) -> None:
        """Take a part's live commit out of use, so that it can be scored again; nothing is deleted.

        Raises:
            MissingError: the part is not scored.
        """
        n = self.commit_of(part).n
        value = {"part": part, "n": n, "reason": reason}
        self.storage.put_new(f"quarantine/{part}.{n}.json", jsonfile.dump(value))

    def read(self, part: str, start: int = 0, stop: int | None = None) -> Arrays:
        """All columns of the sequences [start, stop) of a part's shard, verified.

        Raises:
            MissingError: the part is not scored.
            CorruptError: stored bytes are damaged; names the object.
        """
        commit = self.commit_of(part)
        return self.shard(commit).rows(start, commit.rows if stop is None else stop)

    def unscored(self) -> list[str]:
        """Parts without a live commit that are not retired."""
        done = self.commits().keys() | self.retired()
        return [part for part in self.parts() if part not in done]

    def retired(self) -> set[str]:
        """Parts that new snapshots leave out."""
        return {
            e.path.removeprefix("retired/").removesuffix(".json")
            for e in self.storage.list("retired")
        }

    def retire(self, part: str, reason: str) -> None:
        """Leave a part out of new snapshots; nothing is deleted."""
        self.storage.put_new(
            f"retired/{part}.json", jsonfile.dump({"part": part, "reason": reason})
        )

    def add_shard(
        self, meta: PartMeta, rollouts_hash: str, arrays: Arrays, scored_by: ScoredBy
    ) -> Commit | None:
        """Write an attempt for a part and try to commit it.

        Args:
            meta: what the part says of itself.
            rollouts_hash: hash of the part's bytes that were scored.
            arrays: every column of the shard.
            scored_by: who scored it.

        Returns:
            The commit, or None if another scorer's attempt is the part's shard already.
        """
        from stillroom.cache.zarr_shard import encode_shard

        check_arrays(arrays, self.identity.topk, self.identity.extra)
        attempt = uuid.uuid4().hex
        attributes = self._attributes(meta, arrays)
        encoded = encode_shard(arrays, attributes)
        manifest = Manifest(
            part=meta.name,
            attempt=attempt,
            identity=self.identity.digest(),
            size=len(encoded.data),
            hash=jsonfile.digest(encoded.data),
            arrays=encoded.arrays,
            attributes=attributes,
        ).to_json()
        folder = attempt_path(meta.name, attempt)
        self.storage.put_new(f"{folder}/{OBJECT_NAME}", encoded.data)
        self.storage.put_new(f"{folder}/manifest.json", manifest)
        lengths = [np.diff(arrays[e]) for e in ("sequence_start", "position_start")]
        commit = Commit(
            part=meta.name,
            n=self._next_n(meta.name),
            attempt=attempt,
            identity=self.identity.digest(),
            manifest_hash=jsonfile.digest(manifest),
            rollouts_hash=rollouts_hash,
            rows=len(arrays["prompt_length"]),
            positions=len(arrays["sampled_logprob"]),
            tokens=len(arrays["token"]),
            teacher_prompt_tokens=len(arrays["teacher_prompt"]),
            stored_bytes=len(encoded.data) + len(manifest),
            teacher_s=scored_by.teacher_s,
            scorer=scored_by.scorer,
            row_table=encode_row_table(lengths[0], arrays["prompt_length"], lengths[1]),
        )
        return commit if put_commit(self.storage, commit) else None

    def snapshot(self, parts: Collection[str] | None = None) -> Snapshot:
        """Pin shards; see `snapshot.make_snapshot`."""
        return make_snapshot(self.storage, parts)

    def open_snapshot(self, snapshot_id: str) -> Snapshot:
        """Open a stored snapshot; see `snapshot.open_snapshot`."""
        return open_snapshot(self.storage, snapshot_id)

    def shard(self, commit: Commit) -> Shard:
        """Open a committed shard for reading.

        Raises:
            MismatchError: the commit belongs to another identity.
            CorruptError: its manifest is damaged.
        """
        if commit.identity != self.identity.digest():
            do = "The commit was copied from another cache: remove it by hand."
            raise MismatchError(
                f"commit {commit.part}.{commit.n}", self.identity.digest(), commit.identity, do
            )
        return Shard(self.storage, commit, self.identity.topk, self.identity.extra)

    def _check_meta(self, part: str, meta: PartMeta) -> None:
        mine = (part, self.identity.tokenizer_fingerprint, self.identity.vocab_size)
        theirs = (meta.name, meta.tokenizer_fingerprint, meta.vocab_size)
        if theirs != mine:
            where = self.storage.describe(_part_path(part))
            do = "Sample with a student that has the teacher's tokenizer; do not rename parts."
            expected = f"part, tokenizer and vocabulary {mine}"
            raise MismatchError(where, expected, f"{theirs}", do)

    def _next_n(self, part: str) -> int:
        """One past the quarantined commits of a part; 0 if there are none."""
        entries = [e.path.rsplit("/", 1)[1] for e in self.storage.list("quarantine")]
        return sum(name.startswith(f"{part}.") for name in entries)

    def _attributes(self, meta: PartMeta, arrays: Arrays) -> dict[str, Any]:
        sequences = len(arrays["prompt_length"])
        user = {n: a for n, a in arrays.items() if n.startswith(USER_PREFIX)}
        return {
            "format_version": meta.format_version,
            "part": meta.name,
            "policy_version": meta.policy_version,
            "unit": meta.unit,
            "sampler": meta.sampler,
            "identity": self.identity.digest(),
            "temperature": self.identity.temperature,
            "user_axes": {
                n: "sequence" if len(a) == sequences else "position" for n, a in user.items()
            },
        }


def _part_path(part: str) -> str:
    return f"rollouts/{part}.parquet"
