"""Writing a part's shard: encoded once, put as an attempt, committed unless another attempt was."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.attempt import COMMIT_WITHIN_S, Attempt
from stillroom.cache.check_arrays import check_arrays
from stillroom.cache.commits import Commit, encode_row_table, put_commit
from stillroom.cache.identity import Identity
from stillroom.cache.manifest import Manifest
from stillroom.cache.part import PartMeta
from stillroom.cache.quarantine import next_n
from stillroom.cache.schema import USER_PREFIX, Arrays
from stillroom.cache.shard_format import Encoded, shard_format
from stillroom.cache.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBy:
    """How a shard was made; goes into its commit."""

    teacher_s: float
    """Seconds that the teacher took."""
    scorer: dict[str, Any]
    """Host, process, numeric class, time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewShard:
    """A shard about to be written.

    Args:
        meta: what the part says of itself.
        rollouts_hash: hash of the part's bytes that were scored.
        arrays: every column of the shard.
        scored_by: who scored it.
    """

    meta: PartMeta
    rollouts_hash: str
    arrays: Arrays
    scored_by: ScoredBy


def write_shard(
    storage: Storage,
    identity: Identity,
    shard: NewShard,
    commit_within_s: float = COMMIT_WITHIN_S,
) -> Commit | None:
    """Write an attempt for a part and try to commit it.

    An attempt whose time is up before its commit is left to `gc`, and started again.

    Returns:
        The commit, or None if another scorer's attempt is the part's shard already.

    Raises:
        ShapeError: the arrays are not a whole shard.
        StorageError: the storage refuses; nothing was deleted, and the part can be scored again.
    """
    check_arrays(shard.arrays, identity.topk, identity.extra)
    form = shard_format(identity.shard_format)
    encoded = form.encode(shard.arrays, _attributes(identity, shard))
    while True:
        attempt = Attempt(shard.meta.name, commit_within_s)
        manifest = _manifest(identity, shard, attempt, encoded)
        storage.put_new(f"{attempt.path}/{form.object_name}", encoded.data)
        storage.put_new(f"{attempt.path}/manifest.json", manifest)
        n = next_n(storage, shard.meta.name)
        commit = _commit(identity, shard, attempt, manifest, n, len(encoded.data))
        if not attempt.expired():
            return commit if put_commit(storage, commit) else None


def _manifest(identity: Identity, shard: NewShard, attempt: Attempt, encoded: Encoded) -> bytes:
    return Manifest(
        part=shard.meta.name,
        attempt=attempt.id,
        identity=identity.digest(),
        size=len(encoded.data),
        hash=jsonfile.digest(encoded.data),
        arrays=encoded.arrays,
        row_groups=encoded.row_groups,
        attributes=encoded.attributes,
    ).to_json()


def _commit(
    identity: Identity, shard: NewShard, attempt: Attempt, manifest: bytes, n: int, size: int
) -> Commit:
    arrays = shard.arrays
    tokens, positions = (np.diff(arrays[e]) for e in ("sequence_start", "position_start"))
    return Commit(
        part=shard.meta.name,
        n=n,
        attempt=attempt.id,
        identity=identity.digest(),
        manifest_hash=jsonfile.digest(manifest),
        rollouts_hash=shard.rollouts_hash,
        rows=len(arrays["prompt_length"]),
        positions=len(arrays["sampled_logprob"]),
        tokens=len(arrays["token"]),
        teacher_prompt_tokens=len(arrays["teacher_prompt"]),
        stored_bytes=size + len(manifest),
        teacher_s=shard.scored_by.teacher_s,
        scorer=shard.scored_by.scorer,
        row_table=encode_row_table(tokens, arrays["prompt_length"], positions),
    )


def _attributes(identity: Identity, shard: NewShard) -> dict[str, Any]:
    sequences = len(shard.arrays["prompt_length"])
    user = {n: a for n, a in shard.arrays.items() if n.startswith(USER_PREFIX)}
    return {
        "format_version": shard.meta.format_version,
        "part": shard.meta.name,
        "policy_version": shard.meta.policy_version,
        "unit": shard.meta.unit,
        "sampler": shard.meta.sampler,
        "identity": identity.digest(),
        "temperature": identity.temperature,
        "user_axes": {
            n: "sequence" if len(a) == sequences else "position" for n, a in user.items()
        },
    }
