"""`Cache`: one root with its identity, its parts, its commits, and the shards that readers open."""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.cache import jsonfile
from stillroom.cache.add_rollouts import PART_POSITIONS, AddReport, add_parts, plan_parts
from stillroom.cache.checked_rollouts import check_rollouts, one_batch
from stillroom.cache.commits import (
    Commit,
    commit_path,
    list_commits,
    read_commit,
)
from stillroom.cache.errors import MismatchError, MissingError
from stillroom.cache.id_map import IdMap, put_id_map, read_id_map
from stillroom.cache.identity import Identity
from stillroom.cache.part import (
    NAME,
    PartMeta,
    decode_part,
    decode_rollout_ids,
    decode_row_lengths,
    encode_part,
    part_name,
)
from stillroom.cache.quarantine import next_n, put_quarantine
from stillroom.cache.recycler import Empty
from stillroom.cache.schema import Arrays
from stillroom.cache.shard import Shard
from stillroom.cache.shard_writer import NewShard, ScoredBy, write_shard
from stillroom.cache.snapshot import Snapshot, make_snapshot, open_snapshot
from stillroom.cache.storage import Storage

IDENTITY_PATH = "cache.json"
MAX_IDENTITY_BYTES = 1 << 20


class Cache:
    """A cache of teacher scores.

    Make one with `Cache.create`, or open an existing one with `Cache.open`.
    """

    def __init__(self, storage: Storage, identity: Identity) -> None:
        """Bind a storage to the identity that it holds."""
        self.storage = storage
        self.identity = identity

    @classmethod
    def create(
        cls, root: str | os.PathLike[str], identity: Identity, id_map: IdMap | None = None
    ) -> "Cache":
        """Make a cache, or open the one that is there if its identity is the same.

        Args:
            root: a folder, or an address such as s3://bucket/prefix.
            identity: what all jobs on it must agree on.
            id_map: the map whose digest the identity has, if it has one; stored beside it.

        Raises:
            StorageError: the root cannot be written, or ignores put-if-absent.
            MismatchError: the root holds a cache with another identity.
        """
        storage = Storage(root)
        if not storage.exists(IDENTITY_PATH):
            storage.probe()
            if id_map is not None:
                put_id_map(storage, id_map)
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
            data = storage.get(IDENTITY_PATH, MAX_IDENTITY_BYTES)
        except MissingError as error:
            do = "Check the root, or make a cache with 'stillroom init'."
            raise MissingError(where, "a cache", "no cache.json", do) from error
        return cls(storage, Identity.from_json(data, where))

    def id_map(self) -> IdMap | None:
        """The map from this cache's ids to the teacher's; None where they are the same.

        Raises:
            MissingError: it is gone.
            CorruptError: it is damaged.
        """
        digest = self.identity.id_map
        return read_id_map(self.storage, digest) if digest else None

    def parts(self) -> list[str]:
        """Names of all parts, scored or not, oldest policy first."""
        names = (
            e.path.removeprefix("rollouts/").removesuffix(".parquet")
            for e in self.storage.list("rollouts")
        )
        return sorted(name for name in names if NAME.fullmatch(name))

    def has_part(self, policy_version: int, unit: str) -> bool:
        """Whether the rollouts of a unit are there, or were and are retired."""
        part = part_name(policy_version, unit)
        return any(map(self.storage.exists, (part_path(part), retired_path(part))))

    def add_part(self, table: pa.Table, meta: PartMeta) -> bool:
        """Store rollouts as a part, unless the unit has one already.

        Returns:
            False if a part of that name exists; its bytes stay as they are.

        Raises:
            InputError: a row cannot be scored.
            MismatchError: the rollouts were tokenised with another tokenizer.
        """
        self._check_meta(meta.name, meta)
        identity = self.identity
        data = encode_part(table, meta, identity.max_length, identity.student_extra)
        return self.storage.put_new(part_path(meta.name), data)

    def add_rollouts(
        self,
        rollouts: Any,
        *,
        policy_version: int | None = None,
        sampler: dict[str, Any] | None = None,
        positions_per_part: int = PART_POSITIONS,
        skip_bad: bool = False,
    ) -> AddReport:
        """Store rollouts that another system made, as parts; the same rollouts again add nothing.

        A row with a `rollout_id` that the cache holds, with the same content, is not stored again;
        rows without one are known again only as a whole part of equal rows.

        Args:
            rollouts: a table, a list of mappings, or anything that `pyarrow.table` takes, with the
                columns of a part. Only `prompt` and `completion` are needed, or `token` and
                `scored` in their place: a whole conversation and which of its ids count.
            policy_version: policy that sampled them; None is unknown. Parts of an unknown policy
                are named, and retired, like those of policy 0.
            sampler: its settings; `temperature` is the one that the behaviour logprobs are at, and
                None, also if nothing is said, is unknown.
            positions_per_part: scored tokens of a part, about; the last one may have fewer. With
                another value the same rollouts without ids are stored again.
            skip_bad: leave out rows that cannot be scored, or whose id another rollout of the cache
                has, and report them.

        Raises:
            InputError: a row cannot be scored, or has the id of another rollout, and is named;
                nothing is written. Or there is none.
            ShapeError: a column is missing, unknown or of another type; nothing is written.
            MismatchError: the rollouts are there, of another policy or sampler.
        """
        batch = one_batch(rollouts, "rollouts")
        checked = check_rollouts([batch], self.identity, skip_bad=skip_bad)
        (plan,) = plan_parts(
            self,
            [checked],
            policy_version=policy_version,
            sampler=sampler,
            positions_per_part=positions_per_part,
            skip_bad=skip_bad,
        )
        return add_parts(self, plan)

    def read_part(self, part: str) -> tuple[pa.Table, PartMeta, str]:
        """Rollouts of a part, what is true of all of them, and the hash of its bytes.

        Raises:
            MissingError: there is no such part.
            CorruptError: it cannot be read.
            MismatchError: it is another part, or was tokenised with another tokenizer.
        """
        path = part_path(part)
        data = self.storage.get(path)
        table, meta = decode_part(data, self.storage.describe(path))
        self._check_meta(part, meta)
        return table, meta, jsonfile.digest(data)

    def rollout_ids(self, part: str) -> np.ndarray:
        """(rows,) uint64: ids of a part's rollouts.

        Raises:
            MissingError: there is no such part.
            CorruptError: it cannot be read.
        """
        path = part_path(part)
        return decode_rollout_ids(self.storage.get(path), self.storage.describe(path))

    def row_lengths(self, part: str) -> np.ndarray:
        """(rows,) int64: tokens that the teacher reads for each of a part's rollouts.

        Raises:
            MissingError: there is no such part.
            CorruptError: it cannot be read.
        """
        path = part_path(part)
        return decode_row_lengths(self.storage.get(path), self.storage.describe(path))

    def commits(self) -> dict[str, int]:
        """Live commits: part to n."""
        return list_commits(self.storage)

    def commit_of(self, part: str) -> Commit:
        """The live commit of a part.

        Raises:
            MissingError: the part is not scored.
        """
        try:
            return read_commit(self.storage, commit_path(part, next_n(self.storage, part)))
        except MissingError as error:
            do = "Score it with 'stillroom score'."
            raise MissingError(f"part {part}", "a commit", "none", do) from error

    def is_scored(self, part: str) -> bool:
        """Whether a part has a live commit; asks for two objects only."""
        return self.storage.exists(commit_path(part, next_n(self.storage, part)))

    def is_unscored(self, part: str) -> bool:
        """Whether a part is still to be scored: it has no live commit and is not retired."""
        return not (self.is_scored(part) or self.storage.exists(retired_path(part)))

    def quarantine(self, part: str, reason: str, *, damaged: bool, n: int | None = None) -> None:
        """Take a commit out of use, so that its part can be scored again; nothing is deleted.

        Args:
            part: the part.
            reason: for people.
            damaged: whether it was found bad; then snapshots that name it do not open any more.
                Otherwise it is only to be scored again.
            n: which commit was found so, where it may have been replaced since; None is the live
                one.

        Raises:
            MissingError: the part is not scored.
        """
        n = next_n(self.storage, part) if n is None else n
        if not self.storage.exists(commit_path(part, n)):
            do = "Score it with 'stillroom score'."
            raise MissingError(f"part {part}", "a commit", "none", do)
        put_quarantine(self.storage, part, n, reason, damaged=damaged)

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
        mark = jsonfile.dump_sealed({"part": part, "reason": reason})
        self.storage.put_new(retired_path(part), mark)

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
        shard = NewShard(meta=meta, rollouts_hash=rollouts_hash, arrays=arrays, scored_by=scored_by)
        return write_shard(self.storage, self.identity, shard)

    def snapshot(self, parts: Collection[str] | None = None) -> Snapshot:
        """Pin shards; see `snapshot.make_snapshot`."""
        return make_snapshot(self.storage, parts)

    def open_snapshot(self, snapshot_id: str) -> Snapshot:
        """Open a stored snapshot; see `snapshot.open_snapshot`."""
        return open_snapshot(self.storage, snapshot_id)

    def shard(self, commit: Commit, empty: Empty = np.empty) -> Shard:
        """Open a committed shard for reading.

        Args:
            commit: which one.
            empty: makes the arrays that are read; see `recycler`.

        Raises:
            MismatchError: the commit belongs to another identity.
            CorruptError: its manifest is damaged.
        """
        if commit.identity != self.identity.digest():
            do = "The commit was copied from another cache: remove it by hand."
            raise MismatchError(
                f"commit {commit.part}.{commit.n}", self.identity.digest(), commit.identity, do
            )
        return Shard(self.storage, commit, self.identity, empty)

    def _check_meta(self, part: str, meta: PartMeta) -> None:
        mine = (part, self.identity.tokenizer_fingerprint, self.identity.vocab_size)
        theirs = (meta.name, meta.tokenizer_fingerprint, meta.vocab_size)
        if theirs != mine:
            where = self.storage.describe(part_path(part))
            do = "Sample with a student that has the teacher's tokenizer; do not rename parts."
            expected = f"part, tokenizer and vocabulary {mine}"
            raise MismatchError(where, expected, f"{theirs}", do)


def part_path(part: str) -> str:
    """Object of a part's rollouts."""
    return f"rollouts/{part}.parquet"


def retired_path(part: str) -> str:
    """Object that leaves a part out of new snapshots."""
    return f"retired/{part}.json"
