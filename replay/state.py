"""The state of a stream: a small plain dict, made of where it stands and of all that its order
hangs on."""

from collections.abc import Sequence
from typing import Any

from stillroom.cache.errors import CorruptError, MismatchError
from stillroom.cache.pins import SNAPSHOT_ID
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Feed
from stillroom.replay.place import Place
from stillroom.replay.step import Position

STATE_FORMAT = 3
HISTORY = 8
"""Snapshots of each cache that a state remembers, the newest."""
ROWS = ("snapshot", "selection")
PLACE = ("epoch", "first", "history")
DO = "Resume from another checkpoint."

History = list[tuple[int, str]]
"""Steps at which snapshots were taken up, and their ids; the last is the one in use."""


def state_of(
    config: StreamConfig,
    feeds: Sequence[Feed],
    shares: Sequence[int],
    position: Position,
    history: Sequence[History],
) -> dict[str, Any]:
    """The state before the step at a position."""
    sources = [
        {
            "identity": feed.source.cache.identity.digest(),
            "share": share,
            "snapshot": feed.source.snapshot.id,
            "filter": feed.filter.digest(),
            "selection": feed.selection_digest,
            "epoch": place.epoch,
            "first": place.first,
            "history": [list(entry) for entry in past[-HISTORY:]],
        }
        for feed, share, place, past in zip(feeds, shares, position.places, history, strict=True)
    ]
    return {
        "format": STATE_FORMAT,
        "seed": config.seed,
        "block_rows": config.block_rows,
        "window_rows": config.window_rows,
        "group_rows": config.group_rows,
        "last_batch": config.last_batch,
        "lag_half_life": config.lag_half_life,
        "weight_column": config.weight_column,
        "step": position.step,
        "drawn": position.drawn,
        "epoch_ended": position.epoch_ended,
        "sources": sources,
    }


def snapshots_in(state: dict[str, Any]) -> list[str]:
    """Ids of the snapshots that a state stands in.

    Raises:
        CorruptError: it is not a state.
    """
    try:
        found = [source["snapshot"] for source in state["sources"]]
    except (KeyError, TypeError) as error:
        raise _no_state(f"no usable {error}") from error
    if not all(isinstance(one, str) and SNAPSHOT_ID.fullmatch(one) for one in found):
        raise _no_state(f"{found!r:.80}")
    return found


def check_identities(state: dict[str, Any], identities: Sequence[str]) -> None:
    """See that a state belongs to caches of these identities' digests, as many as it has.

    Raises:
        MismatchError: it belongs to others.
    """
    for mine, theirs in zip(identities, state["sources"], strict=True):
        _check_same({"identity": mine}, theirs, ())


def check_settings(
    state: dict[str, Any], config: StreamConfig, feeds: Sequence[Feed], shares: Sequence[int]
) -> None:
    """See that a state belongs to these caches and settings, whichever their snapshots are.

    Raises:
        MismatchError: it belongs to others; names what differs.
        CorruptError: it is not a state.
    """
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise _others({"format": STATE_FORMAT}, {"format": got})
    found = len(snapshots_in(state))
    if found != len(feeds):
        raise _others({"sources": len(feeds)}, {"sources": found})
    mine = _beginning(config, feeds, shares)
    _check_same(mine, state, ("step", "drawn", "epoch_ended", "sources"))
    for own, theirs in zip(mine["sources"], state["sources"], strict=True):
        _check_same(own, theirs, (*ROWS, *PLACE))


def check_state(
    state: dict[str, Any], config: StreamConfig, feeds: Sequence[Feed], shares: Sequence[int]
) -> tuple[Position, list[History]]:
    """Where a state stands, if it belongs to these caches, snapshots and settings.

    Raises:
        MismatchError: it belongs to others; names what differs.
        CorruptError: it is not a state, or names no place in this order.
    """
    check_settings(state, config, feeds, shares)
    mine = _beginning(config, feeds, shares)
    for own, theirs in zip(mine["sources"], state["sources"], strict=True):
        _check_same(own, theirs, PLACE)
    return _position(state, feeds), [_history(source) for source in state["sources"]]


def _beginning(
    config: StreamConfig, feeds: Sequence[Feed], shares: Sequence[int]
) -> dict[str, Any]:
    start = Position(0, 0, (Place(),) * len(feeds))
    return state_of(config, feeds, shares, start, [[]] * len(feeds))


def _check_same(mine: dict[str, Any], theirs: dict[str, Any], free: Sequence[str]) -> None:
    differing = [key for key in mine if key not in free and theirs.get(key) != mine[key]]
    if differing:
        raise _others(
            {key: mine[key] for key in differing}, {key: theirs.get(key) for key in differing}
        )


def _others(mine: dict[str, Any], theirs: dict[str, Any]) -> MismatchError:
    expected, got = (
        ", ".join(f"{key} = {value!r}" for key, value in values.items())
        for values in (mine, theirs)
    )
    do = "Resume with the caches, snapshots and settings of the run that saved it."
    return MismatchError("stream state", expected, got, do)


def _position(state: dict[str, Any], feeds: Sequence[Feed]) -> Position:
    places = []
    for feed, source in zip(feeds, state["sources"], strict=True):
        epoch, first = _count(source, "epoch"), _count(source, "first")
        units = feed.units_in(epoch)
        if first >= units:
            expected, got = f"a place below {units} in epoch {epoch}", f"{first}"
            raise CorruptError("stream state", expected, got, DO)
        places.append(Place(epoch, first))
    ended = state.get("epoch_ended")
    if not isinstance(ended, bool):
        got = f"{ended!r:.40}"
        raise CorruptError("stream state", "true or false as epoch_ended", got, DO)
    return Position(_count(state, "step"), _count(state, "drawn"), tuple(places), ended)


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise CorruptError("stream state", f"a count as {name}", f"{value!r:.40}", DO)
    return value


def _history(source: dict[str, Any]) -> History:
    history = source.get("history")
    try:
        found = [(int(step), str(snapshot)) for step, snapshot in history]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise _no_state(f"history {history!r:.60}") from error
    if not found or found[-1][1] != source["snapshot"]:
        raise _no_state(f"history {history!r:.60} of snapshot {source['snapshot']!r:.40}")
    return found


def _no_state(got: str) -> CorruptError:
    return CorruptError("stream state", "what state_dict() gave", got, DO)
