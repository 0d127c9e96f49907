"""One process alone is the first rank and every rank; several are tested where they start."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState

from stillroom.cache.errors import ConfigError, CorruptError
from stillroom.train import ranks
from stillroom.train.ranks import from_every_rank, from_first_rank, join_ranks, rank, world


def joined_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if something before had made this process's state, on a machine with one GPU."""
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize("before", ["cpu", "cuda:0"])
def test_one_process_trains_where_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Wherever another trainer in it has trained before."""
    joined_on(before, monkeypatch)
    assert join_ranks("cpu") == torch.device("cpu")
    assert join_ranks("auto") == torch.device("cuda:0")


def test_launched_processes_stay_where_they_were_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    for before, other in (("cpu", "auto"), ("cuda:0", "cpu")):
        joined_on(before, monkeypatch)
        with pytest.raises(ConfigError, match=rf"train\.device: .* 2 processes.*got '{other}'"):
            join_ranks(other)
        same = "cpu" if other == "auto" else "auto"
        assert join_ranks(same) == torch.device(before)


def test_cpu_is_chosen_where_it_is_named_or_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where the launcher was told so."""
    PartialState(cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert join_ranks("cpu") == join_ranks("auto") == torch.device("cpu")
    joined_on("cpu", monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert join_ranks("auto") == torch.device("cpu")


def test_one_process() -> None:
    assert (rank(), world()) == (0, 1)
    assert from_first_rank(lambda: 3) == 3
    assert from_every_rank({"a": 1}) == [{"a": 1}]


def test_an_error_of_the_first_rank_is_everyones() -> None:
    def choose() -> None:
        raise CorruptError("a", "b", "c", "d")

    with pytest.raises(CorruptError, match="expected b"):
        from_first_rank(choose)
