"""What `run` checks of the further data of its training before it writes anything: datasets and
caches of phases, and the cache that the student is measured on."""

from dataclasses import replace

from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.errors import ConfigError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.identity import Identity
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.feed import Feed, Source
from stillroom.replay.stream_checks import check_batch
from stillroom.train.run_config import RunConfig


def check_phases(config: RunConfig, student: ModelFiles) -> None:
    """Refuse phases on datasets that cannot be used, on caches that the student does not fit, and
    on either with fewer rows than a step takes. The run's own cache may be yet to come.

    Raises:
        MissingError: a file or a cache is not there.
        InputError: a dataset cannot be used, or there are too few rows.
        MismatchError: a cache has another tokenizer.
        ConfigError: a phase trains on what the student is measured on.
    """
    from stillroom.train.fits import check_fits, place_of
    from stillroom.train.open_phases import load_rows
    from stillroom.train.supervised import SupervisedStream

    train, own = config.train, place_of(config.root)
    measured = None if train.eval_root is None else place_of(train.eval_root)
    for index, phase in enumerate(train.phases):
        if phase.supervised is not None:
            SupervisedStream(load_rows(phase.supervised, student), phase.supervised).close()
        elif phase.root is not None and place_of(phase.root) != own:
            if place_of(phase.root) == measured:
                _refuse_measured(f"train.phases, item {index}, root", phase.root)
            cache = Cache.open(phase.root)
            check_fits(student, cache, replace(train, temperature=None))
            check_batch([Feed(Source(cache, _scored(cache)), 0, train.replay)], train.replay)


def check_held_out(config: RunConfig, identity: Identity) -> None:
    """Refuse a `train.eval_root` that training cannot measure on.

    Args:
        config: the run's settings.
        identity: of the cache that is trained on.

    Raises:
        MissingError: there is no cache.
        MismatchError: it holds scores of another teacher, or other scores.
        ConfigError: it is the cache that is trained on.
        InputError: it has no row, or one that is too long.
    """
    from stillroom.train.evaluate import measured_rows
    from stillroom.train.fits import place_of

    root = config.train.eval_root
    if root is None:
        return
    if place_of(root) == place_of(config.root):
        _refuse_measured("train.eval_root", root)
    cache = Cache.open(root)
    identity.check_same(cache.identity, f"train.eval_root, {root}")
    measured_rows(cache, _scored(cache), config.train.replay)


def _scored(cache: Cache) -> Snapshot:
    """What a snapshot of now would hold; none is stored."""
    live, retired = cache.commits(), cache.retired()
    paths = [commit_path(part, live[part]) for part in sorted(live.keys() - retired)]
    return Snapshot(tuple(read_commit(cache.storage, path) for path in paths))


def _refuse_measured(where: str, root: str) -> None:
    do = "Keep held-out rollouts in a cache of their own."
    raise ConfigError(where, "another cache to train on than to measure on", root, do)
