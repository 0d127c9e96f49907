"""What a trainer checks before it loads anything: student, settings, cache and ranks fit each
other."""

from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.replay.policies import check_student, policy_versions, read_policy
from stillroom.train.config import RUN_NAME, ReplayConfig
from stillroom.train.ranks import from_every_rank


def check_run_name(run: str) -> None:
    """Refuse a name that could not be a path.

    Raises:
        ConfigError: it is not like that.
    """
    if not RUN_NAME.fullmatch(run):
        do = "Choose another name."
        raise ConfigError("run", "letters, digits, dots, dashes and underscores", repr(run), do)


def check_fits(files: ModelFiles, cache: Cache, config: ReplayConfig) -> None:
    """Refuse a student that does not know the cache's ids, and another temperature than its scores
    have.

    Raises:
        MismatchError: says which.
    """
    identity = cache.identity
    check_student(files, identity.tokenizer_fingerprint, identity.vocab_size, identity.teacher.name)
    if config.temperature not in (None, identity.temperature):
        expected = f"the cache's, {identity.temperature}: scores cannot be re-tempered"
        do = "Leave it out, or score with another cache at that temperature."
        raise MismatchError("train.temperature", expected, f"{config.temperature}", do)


def check_ranks_agree(run: str, files: ModelFiles, snapshot: Snapshot) -> None:
    """Refuse ranks with other students or snapshots than this one's.

    Raises:
        MismatchError: names the rank.
    """
    mine = (files.fingerprint, snapshot.id)
    for rank, theirs in enumerate(from_every_rank(mine)):
        if theirs != mine:
            do = "Pin one snapshot, and give it to every rank."
            where = f"{run}, rank {rank}"
            raise MismatchError(where, f"student and snapshot {mine}", f"{theirs}", do)


def check_same_rows(source: str, digest: str) -> None:
    """Refuse ranks that read other rows from a dataset than this one; every rank calls it.

    Raises:
        MismatchError: names the rank.
    """
    for rank, theirs in enumerate(from_every_rank(digest)):
        if theirs != digest:
            do = "Give every rank the same file."
            where = f"{source}, rank {rank}"
            raise MismatchError(where, f"rows of digest {digest}", theirs, do)


def check_not_held_out(where: str, root: str, eval_root: str | None) -> None:
    """Refuse to train on the cache that the student is measured on.

    Raises:
        ConfigError: both are one.
    """
    if eval_root is not None and place_of(root) == place_of(eval_root):
        do = "Keep held-out rollouts in a cache of their own."
        raise ConfigError(where, "another cache than train.eval_root", root, do)


def place_of(root: str) -> str:
    """Where a root is, however it was written."""
    plain = root.removeprefix("file://")
    return plain.rstrip("/") if "://" in plain else str(local_path(plain).resolve())


def policy_of(files: ModelFiles, cache: Cache) -> int:
    """The newest policy of the cache with these weights; -1 if there is none."""
    for version in reversed(policy_versions(cache.storage)):
        if read_policy(cache.storage, version).fingerprint == files.fingerprint:
            return version
    return -1
