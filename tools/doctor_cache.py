"""What `doctor` reads of a cache: its identity, and claims of parts that dead workers left, of
rollouts and scores."""

import time

from stillroom.cache import jsonfile
from stillroom.cache.claims import DEAD_AFTER_S, FOLDER, MAX_BYTES, Claim, may_run
from stillroom.cache.errors import CorruptError, MissingError, StillroomError
from stillroom.cache.part import NAME
from stillroom.cache.storage import Storage
from stillroom.cache.storage_entry import Entry
from stillroom.cache.store import Cache
from stillroom.tools.doctor_finding import Finding, failed
from stillroom.tools.listing import describe_identity

MOST_CLAIMS = 1000


def check_identity(storage: Storage) -> tuple[Finding, Cache | None]:
    """Whether there is a cache, and one that can be read."""
    what = "identity"
    try:
        cache = Cache.open(storage.root)
    except MissingError:
        got = "no cache yet; 'stillroom init' makes one"
        return Finding(level="ok", what=what, got=got), None
    except StillroomError as error:
        return failed(what, error), None
    return Finding(level="ok", what=what, got=describe_identity(cache)), cache


def check_claims(cache: Cache, clock_offset_s: float) -> Finding:
    """Whether workers died with parts in hand.

    Args:
        cache: the cache.
        clock_offset_s: the store's clock less this machine's.
    """
    what, storage = "claims", cache.storage
    try:
        parts, done = set(cache.parts()), cache.commits().keys() | cache.retired()
        names = {e: _part(e) for e in storage.list(FOLDER)}
        open_ones = [e for e, name in names.items() if NAME.fullmatch(name) and name not in done]
        entries = sorted(open_ones, key=lambda e: e.modified)[-MOST_CLAIMS:]
        now = time.time() + clock_offset_s
        claims = [(_read(storage, entry), entry.modified) for entry in entries]
    except StillroomError as error:
        return failed(what, error)
    working = [(claim, modified) for claim, modified in claims if claim and claim.working]
    dead = [claim for claim, modified in working if not _is_live(claim, now - modified)]
    live = [claim for claim, _ in working if claim not in dead]
    scoring = sum(claim.part in parts for claim in live)
    figures = {"live_claims": float(len(live)), "dead_claims": float(len(dead))}
    got = f"{scoring} parts are being scored, of {len(parts - done)} that are to be"
    if len(live) > scoring:
        got += f"; {len(live) - scoring} are being sampled"
    if not dead:
        return Finding(level="ok", what=what, got=got, figures=figures)
    first = dead[0]
    job = "score" if first.part in parts else "rollout"
    got += f"; {len(dead)} left by dead workers, such as {first.part} by {first.host} {first.pid}"
    do = f"The next 'stillroom {job}' takes over {first.part}; see why the workers ended."
    return Finding(level="warning", what=what, got=got, do=do, figures=figures)


def _part(entry: Entry) -> str:
    return entry.path.removeprefix(f"{FOLDER}/").removesuffix(".json")


def _read(storage: Storage, entry: Entry) -> Claim | None:
    try:
        value = jsonfile.load_sealed(storage.get(entry.path, MAX_BYTES), entry.path)
        claim: Claim = jsonfile.build(Claim, value, entry.path)
    except (CorruptError, MissingError):
        return None
    return claim


def _is_live(claim: Claim, age_s: float) -> bool:
    return may_run(claim) and abs(age_s) < DEAD_AFTER_S
