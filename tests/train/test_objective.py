"""Settings of the loss: what goes together is taken, all else is refused by name."""

import itertools
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.train.config import ReplayConfig
from stillroom.train.objective import DIVERGENCES, KINDS, MODES, PARAMETERS, Objective


def made(kind: str, **values: Any) -> Objective:
    """Settings of a kind with its parameter."""
    mine = PARAMETERS.get(kind)
    return Objective(kind=kind, **({mine: 0.25} if mine else {}) | values)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_takes_its_parameter_and_no_other(kind: str) -> None:
    mine = PARAMETERS.get(kind)
    assert made(kind).param == (0.25 if mine else None)
    for name in set(PARAMETERS.values()) - {mine}:
        with pytest.raises(ConfigError, match=rf"train\.{name}.*{kind} takes none"):
            made(kind, **{name: 0.25})


@pytest.mark.parametrize(("kind", "mode"), [*itertools.product(KINDS, MODES)])
def test_modes(kind: str, mode: str) -> None:
    """Tail with all, renorm with divergences, the other two with forward KL alone."""
    taken = mode == "tail" or kind == "forward" or (mode == "renorm" and kind in DIVERGENCES)
    if taken:
        assert made(kind, mode=mode).mode == mode
    else:
        with pytest.raises(ConfigError, match=r"train\.mode: expected 'tail'"):
            made(kind, mode=mode)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sideways"}, r"train\.kind.*one of"),
        ({"kind": "jsd"}, r"train\.beta.*excluded; got None"),
        ({"kind": "jsd", "beta": 1.0}, r"train\.beta.*excluded"),
        ({"kind": "mixed", "forward_weight": 1.1}, r"train\.forward_weight.*0 to 1"),
        ({"kind": "reverse", "mode": "truncated"}, "moved most of its mass off"),
        ({"kind": "reverse", "mode": "zero_tail"}, "finite for every student"),
        ({"importance": "some"}, r"train\.importance.*one of"),
        ({"importance_cap": 0.0}, r"train\.importance_cap.*above 0"),
        ({"importance_range": (2.0, 1.0)}, r"train\.importance_range"),
        ({"clip_range": 0.2}, r"train\.clip_range.*only policy gradients"),
        ({"kind": "policy_gradient", "clip_range": 1.0}, r"train\.clip_range.*between 0 and 1"),
        ({"baseline": True}, r"train\.baseline.*only policy gradients"),
        ({"importance": "tis"}, r"train\.importance.*forward has none; got 'tis'"),
        ({"kind": "policy_gradient", "importance_cap": 3.0}, r"importance_cap.*only tis"),
        (
            {"kind": "reverse_kl_rb", "importance": "tis", "importance_range": (0.1, 2.0)},
            r"importance_range.*only icepop",
        ),
        (
            {"kind": "policy_gradient", "importance": "none", "clip_range": 0.2},
            r"train\.clip_range.*never clipped",
        ),
        (
            {
                "kind": "policy_gradient",
                "importance": "tis",
                "importance_cap": 1.2,
                "clip_range": 0.2,
            },
            r"train\.clip_range.*below 1.2 - 1",
        ),
        ({"cross_entropy_sources": ("techer",)}, r"cross_entropy_sources.*some of.*got \('techer'"),
        ({"cross_entropy": 0.1, "cross_entropy_sources": ()}, r"sources.*one source at least"),
        ({"cross_entropy": 1.5}, r"train\.cross_entropy.*0 to 1"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective(**values)
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, r"train\.max_steps.*at least 1, or -1"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps.*at least 1"),
        ({"temperature": 0.0}, r"train\.temperature.*above 0"),
        ({"loss_bytes": 1000}, r"train\.loss_bytes.*1 MiB"),
        ({"device": "tpu"}, r"train\.device.*one of"),
    ],
)
def test_settings_of_training_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**values)
