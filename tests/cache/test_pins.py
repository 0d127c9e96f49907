"""Pins: what runs use, until they let go of it or are silent for too long."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.clock import DAY_S
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.pins import (
    LIFETIME_S,
    active_pins,
    list_pins,
    pin,
    pin_path,
    pinned_shards,
    renew_pin,
    unpin,
)
from stillroom.cache.storage import Storage
from stillroom.cache.store import Cache
from tests.cache.fakes import commit_shard, make_meta, random_arrays

ONE, TWO = "1" * 32, "2" * 32


class SetStorage(Storage):
    """A storage whose clock the test sets."""

    time = 1000.0

    def now(self) -> float:
        """The test's time."""
        return self.time


@pytest.fixture
def storage(tmp_path: Path) -> SetStorage:
    """An empty one."""
    return SetStorage(tmp_path)


def test_a_pin_holds_until_it_expires(storage: SetStorage) -> None:
    pin(storage, "run", [TWO, ONE])
    assert active_pins(storage)["run"].snapshots == [ONE, TWO]
    storage.time += LIFETIME_S - 1
    assert active_pins(storage).keys() == {"run"}
    storage.time += 1
    assert active_pins(storage) == {}
    assert [found.run for found in list_pins(storage)] == ["run"]
    assert LIFETIME_S == 7 * DAY_S


def test_a_run_has_one_pin(storage: SetStorage) -> None:
    pin(storage, "run", [ONE])
    pin(storage, "run", [TWO])
    pin(storage, "other", [ONE])
    assert {run: found.snapshots for run, found in active_pins(storage).items()} == {
        "run": [TWO],
        "other": [ONE],
    }
    unpin(storage, "run")
    unpin(storage, "run")
    assert active_pins(storage).keys() == {"other"}


def test_a_pin_is_renewed_when_less_than_half_is_left(storage: SetStorage) -> None:
    first = pin(storage, "run", [ONE])
    storage.time += LIFETIME_S / 2
    assert renew_pin(storage, "run", [ONE]) == first
    storage.time += 1
    assert renew_pin(storage, "run", [ONE]).expires == storage.time + LIFETIME_S
    assert renew_pin(storage, "run", [TWO]).snapshots == [TWO]
    unpin(storage, "run")
    assert renew_pin(storage, "run", [ONE]).snapshots == [ONE]
    assert active_pins(storage).keys() == {"run"}


@pytest.mark.parametrize("data", [b"", b"x", b"{}"])
def test_a_damaged_pin_of_its_own_is_put_again(storage: SetStorage, data: bytes) -> None:
    storage.put(pin_path("run"), data)
    assert renew_pin(storage, "run", [ONE]).snapshots == [ONE]
    assert active_pins(storage)["run"].snapshots == [ONE]


@pytest.mark.parametrize("run", ["", "a/b", "..", "../x", ".hidden", "a b", "a\n"])
def test_a_name_that_is_no_path_is_refused(storage: SetStorage, run: str) -> None:
    with pytest.raises(ConfigError, match="run: expected letters"):
        pin(storage, run, [ONE])
    assert storage.list("pins") == []


@pytest.mark.parametrize("snapshot_id", ["", "x", ONE + "\n", ONE.upper() + "A"])
def test_what_is_no_snapshot_is_not_pinned(storage: SetStorage, snapshot_id: str) -> None:
    with pytest.raises(InputError, match="pin of run run: expected 32 hexadecimal digits"):
        pin(storage, "run", [ONE, snapshot_id])
    assert active_pins(storage) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"run": "other"},
        {"snapshots": "x"},
        {"snapshots": ["../x"]},
        {"snapshots": [1]},
        {"expires": "soon"},
        {"more": 1},
    ],
)
def test_a_pin_that_cannot_be_read_is_named(storage: SetStorage, change: dict[str, Any]) -> None:
    good = {"run": "run", "snapshots": [ONE], "expires": 5000.0}
    storage.put(pin_path("run"), jsonfile.dump_sealed(good | change))
    with pytest.raises(CorruptError, match=r"pins/run\.json"):
        active_pins(storage)


def test_a_pin_keeps_the_shards_of_its_snapshots(cache: Cache) -> None:
    commits = [commit_shard(cache, random_arrays(0, 12, 4), number) for number in range(3)]
    both, last = (cache.snapshot([c.part for c in some]) for some in (commits[:2], commits[2:]))
    pin(cache.storage, "run", [both.id])
    pinned = pinned_shards(cache.storage)
    assert [pinned.keeper((c.part, 0)) for c in commits] == [*["pinned by run run"] * 2, None]
    pin(cache.storage, "run", [both.id, last.id])
    assert pinned_shards(cache.storage).keeper((commits[2].part, 0)) == "pinned by run run"
    assert pinned_shards(cache.storage).keeper((commits[2].part, 1)) is None
    assert pinned_shards(cache.storage, cache.storage.now() + 8 * DAY_S).by_run == {}


def test_what_cannot_be_read_keeps_everything(cache: Cache) -> None:
    pin(cache.storage, "run", [ONE])
    pinned = pinned_shards(cache.storage)
    assert "run run pins a snapshot that cannot be read" in str(pinned.unknown)
    assert pinned.keeper((make_meta(9).name, 0)) == pinned.unknown
