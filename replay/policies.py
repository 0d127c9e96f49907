"""Published students: one JSON object a policy version, put if absent, beside the weights that it
names."""

from dataclasses import asdict, dataclass
from pathlib import Path

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.storage import Storage
from stillroom.cache.storage_entry import SAFE_PATH

MAX_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One published student."""

    version: int
    """0 is the initial student."""
    run: str
    """The run that published it."""
    parent: int | None
    """Policy that it was trained from; None for version 0."""
    step: int
    """Optimiser steps that the run had taken."""
    path: str | None
    """Folder with its weights; relative to the root where it lies below it. None for a student in
    the middle of a run, which sampled and was trained on: nobody kept its weights."""
    fingerprint: str | None
    """Of its files; None without."""


def policy_path(version: int) -> str:
    """Object of a policy."""
    return f"policies/{version:06d}.json"


def put_policy(storage: Storage, policy: Policy) -> bool:
    """Publish; False if the version exists."""
    return storage.put_new(policy_path(policy.version), jsonfile.dump_sealed(asdict(policy)))


def read_policy(storage: Storage, version: int) -> Policy:
    """Read a published policy.

    Raises:
        MissingError: there is none of that version.
        CorruptError: it is damaged, of another version, not newer than its parent, or has weights
            outside of the root by a relative path.
    """
    path = policy_path(version)
    where = storage.describe(path)
    try:
        data = storage.get(path, MAX_BYTES)
    except MissingError as error:
        do = "List the policies with 'stillroom status'."
        raise MissingError(where, f"policy {version}", "none", do) from error
    policy: Policy = jsonfile.build(Policy, jsonfile.load_sealed(data, where), where)
    folder, is_kept = policy.path, policy.fingerprint is not None
    is_safe = folder is None or Path(folder).is_absolute() or SAFE_PATH.fullmatch(folder)
    if policy.version != version or not is_safe or is_kept != (folder is not None):
        expected = f"policy {version}, its weights below the root or at an absolute path"
        got = f"policy {policy.version} at {policy.path!r:.200}"
        raise CorruptError(where, expected, got, "Restore the file.")
    if policy.parent is not None and not 0 <= policy.parent < version:
        got = f"policy {policy.parent}"
        raise CorruptError(where, f"a parent below {version}", got, "Restore the file.")
    return policy


def policy_versions(storage: Storage) -> list[int]:
    """Versions published so far, ascending."""
    names = [
        e.path.removeprefix("policies/").removesuffix(".json") for e in storage.list("policies")
    ]
    return sorted(int(name) for name in names if name.isdecimal())


def newest_kept(storage: Storage) -> int | None:
    """The newest version whose weights were kept; None without any."""
    versions = reversed(policy_versions(storage))
    return next((v for v in versions if read_policy(storage, v).path is not None), None)


def free_version(storage: Storage, parent: int) -> int:
    """The version for a student that was trained from a policy: the next one that is not taken by
    a student without weights."""
    version, taken = parent + 1, set(policy_versions(storage))
    while version in taken and read_policy(storage, version).path is None:
        version += 1
    return version


def line_of(storage: Storage, version: int, length: int) -> list[int]:
    """A policy, its parent, the parent's parent and so on, `length` of them at most.

    Raises:
        MissingError: one of them is not recorded.
        CorruptError: a record is damaged.
    """
    line: list[int] = []
    next_one: int | None = version
    while next_one is not None and len(line) < length:
        line.append(next_one)
        next_one = read_policy(storage, next_one).parent
    return line


def record_unkept(storage: Storage, *, run: str, parent: int, step: int) -> Policy:
    """Give a student in the middle of a run the next free version, without its weights: what it
    samples names who sampled it."""
    version = max(policy_versions(storage), default=0) + 1
    while True:
        policy = Policy(
            version=version, run=run, parent=parent, step=step, path=None, fingerprint=None
        )
        if put_policy(storage, policy):
            return policy
        version += 1


def policy_folder(storage: Storage, policy: Policy) -> Path:
    """Where a policy's weights lie.

    Raises:
        MissingError: nobody kept them.
    """
    if policy.path is None:
        where, do = storage.describe(policy_path(policy.version)), "Take a published policy."
        got = f"none: {policy.run} went on from it after step {policy.step}"
        raise MissingError(where, f"the weights of policy {policy.version}", got, do)
    folder = Path(policy.path)
    return folder if folder.is_absolute() else storage.folder / folder


def open_policy(storage: Storage, version: int, known: ModelFiles | None = None) -> ModelFiles:
    """Inspect a policy's weights.

    Args:
        storage: the cache's.
        version: which policy.
        known: a student at hand; if it is that policy it is taken, wherever it lies.

    Raises:
        MismatchError: they are not the ones that were published.
        MissingError: they are gone.
    """
    policy = read_policy(storage, version)
    if known is not None and known.fingerprint == policy.fingerprint:
        return known
    folder = policy_folder(storage, policy)
    if not folder.is_dir():
        do = "Restore it, or name the folder of the same weights with --student."
        raise MissingError(str(folder), f"the weights of policy {version}", "no folder", do)
    files = inspect_model(str(folder))
    if files.fingerprint != policy.fingerprint:
        do = "The folder was changed after it was published: restore it, or start a new root."
        where = f"policy {version} at {folder}"
        raise MismatchError(where, f"fingerprint {policy.fingerprint}", files.fingerprint, do)
    return files


def register_initial(storage: Storage, files: ModelFiles, run: str) -> None:
    """Make a student policy 0 of a cache.

    Raises:
        MismatchError: policy 0 is another student.
    """
    policy = Policy(
        version=0,
        run=run,
        parent=None,
        step=0,
        path=str(files.folder.absolute()),
        fingerprint=files.fingerprint,
    )
    if not put_policy(storage, policy):
        first = read_policy(storage, 0)
        if first.fingerprint != files.fingerprint:
            where = storage.describe(policy_path(0))
            do = "A cache has one initial student: use that one, or another root."
            got = f"{files.folder} ({files.fingerprint})"
            raise MismatchError(where, f"the student {first.path} ({first.fingerprint})", got, do)


def check_student(
    files: ModelFiles, tokenizer_fingerprint: str, vocab_size: int, teacher: str
) -> None:
    """Refuse a student whose ids do not mean what the teacher's mean.

    Raises:
        MismatchError: other tokenizer, other vocabulary, or a head smaller than the vocabulary.
    """
    where = str(files.folder)
    do = "Choose a student with the cache's tokenizer; 'init --student' can map a teacher's ids."
    if files.vocab_size != vocab_size:
        expected = f"the vocabulary of {teacher}, {vocab_size} tokens"
        raise MismatchError(where, expected, f"{files.vocab_size} tokens", do)
    if files.tokenizer_fingerprint != tokenizer_fingerprint:
        expected = f"the tokenizer of {teacher} ({tokenizer_fingerprint})"
        raise MismatchError(
            where, expected, f"another of the same size ({files.tokenizer_fingerprint})", do
        )
    if files.logit_width < vocab_size:
        raise MismatchError(
            where, f"an output head of at least {vocab_size} rows", f"{files.logit_width}", do
        )
