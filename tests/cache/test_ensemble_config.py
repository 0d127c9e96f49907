"""Settings of an ensemble: weights, and which servers run which member."""

import math
from typing import Any

import pytest

from stillroom.cache.ensemble_config import Member, shares
from stillroom.cache.errors import ConfigError
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.teacher import TeacherConfig


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_weights_are_finite_and_above_zero(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.ensemble, weight: expected a finite number"):
        Member(model="b", weight=weight)
    with pytest.raises(ConfigError, match=r"^teacher\.weight: expected a finite number above 0"):
        TeacherConfig(model="a", weight=weight)


def test_shares_sum_to_one_and_only_ratios_count() -> None:
    assert shares([1.0, 3.0]) == shares([2.0, 6.0]) == shares([0.1, 0.3]) == (0.25, 0.75)
    assert shares([0.1, 0.2, 0.4]) == shares([1, 2, 4]) == shares([1e-3, 2e-3, 4e-3])
    config = TeacherConfig(model="a", weight=2.0, ensemble=(Member(model="b", weight=6.0),))
    assert config.shares() == (0.25, 0.75)
    assert TeacherConfig(model="a").shares() == (1.0,)


def test_members_share_all_settings_but_model_and_servers() -> None:
    member = Member(
        model="b", revision="r", weight=2.0, urls=("http://b",), served_model="served-b"
    )
    config = TeacherConfig(
        model="a",
        dtype="bfloat16",
        backend="server",
        server=ServerConfig(urls=("http://a",), model="served-a", timeout_s=5.0),
        ensemble=(member, Member(model="c", urls=("http://c",))),
    )
    first, second, third = config.members()
    assert (first.model, first.server.urls, first.ensemble) == ("a", ("http://a",), ())
    names = [one.server.model for one in (first, second, third)]
    assert names == ["served-a", "served-b", None]
    assert (second.model, second.revision, second.weight) == ("b", "r", 1.0)
    assert (second.server.urls, second.server.timeout_s) == (("http://b",), 5.0)
    assert (second.dtype, second.ensemble) == ("bfloat16", ())


@pytest.mark.parametrize("left_over", [{"weight": 2.0}, {"ensemble_topk": 8}])
def test_settings_of_an_ensemble_are_refused_without_one(left_over: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.weight, teacher\.ensemble_topk: expected no"):
        TeacherConfig(model="a", **left_over)


def test_servers_are_named_where_there_are_some() -> None:
    server, where = ServerConfig(urls=("http://a",)), r"^teacher\.ensemble, urls: expected servers"
    with pytest.raises(ConfigError, match=where):
        TeacherConfig(model="a", backend="server", server=server, ensemble=(Member(model="b"),))
    with pytest.raises(ConfigError, match=where):
        TeacherConfig(model="a", ensemble=(Member(model="b", urls=("http://b",)),))
    with pytest.raises(ConfigError, match=r"^teacher\.ensemble, served_model: expected the back"):
        TeacherConfig(model="a", ensemble=(Member(model="b", served_model="b"),))


def test_entries_that_are_asked_for_are_one_at_least() -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.ensemble_topk: expected at least 1; got 0"):
        TeacherConfig(model="a", ensemble=(Member(model="b"),), ensemble_topk=0)
