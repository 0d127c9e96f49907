"""`show`: the numbers of a rollout as they were stored, and text that cannot harm a terminal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.store import Cache


@pytest.fixture
def shown(made_root: Path, live_part: str, run: Any) -> Any:
    """Row 0 of the scored part."""
    return run("show", made_root, live_part, "--json").json()


def test_gives_what_the_shard_holds(shown: Any, made_root: Path, live_part: str) -> None:
    cache = Cache.open(made_root)
    arrays = cache.shard(cache.commit_of(live_part)).rows(0, 1)
    assert [p["logprob"] for p in shown["positions"]] == arrays["sampled_logprob"].tolist()
    assert [p["behaviour_logprob"] for p in shown["positions"]] == arrays[
        "behaviour_logprob"
    ].tolist()
    tail = np.exp(arrays["tail_logprob"].astype(float))
    assert [p["tail_mass"] for p in shown["positions"]] == pytest.approx(tail.tolist())
    ids = shown["prompt_ids"] + shown["completion_ids"]
    assert ids == arrays["token"].tolist()
    assert [p["token_id"] for p in shown["positions"]] == shown["completion_ids"]


def test_rank_of_the_least_and_the_most_likely(shown: Any) -> None:
    assert [p["rank"] for p in shown["positions"][:2]] == [None, 1]
    assert shown["positions"][1]["probability"] > 0.99


def test_text_of_whole_and_of_tokens(shown: Any) -> None:
    assert shown["prompt"] == "<|user|>hi<|end|><|assistant|>"
    assert shown["completion"].startswith("abc \x1b[31mred\u202e caf\u00e9")
    assert shown["positions"][0]["text"] == "abc"
    assert shown["meta"]["finish_reason"] == "length"
    assert shown["notes"] == []


def test_control_characters_are_escaped(made_root: Path, live_part: str, run: Any) -> None:
    out = run("show", made_root, live_part).out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "  | abc \\x1b[31mred\\u202e caf\u00e9\n  | [bold]x[/bold]\n" in out
    assert "'\\x1b'" in out
    assert "outside" in out


def test_mask_own_prompt_and_unknown_behaviour(made_root: Path, live_part: str, run: Any) -> None:
    rows = [run("show", made_root, live_part, "--row", i, "--json").json() for i in range(4)]
    assert rows[1]["teacher_prompt_ids"] == rows[1]["prompt_ids"] * 2
    assert rows[2]["positions"][0]["index"] == 1
    assert len(rows[2]["positions"]) == len(rows[2]["completion_ids"]) - 1
    assert rows[3]["positions"][0]["behaviour_logprob"] is None


def test_alternatives_mark_the_sampled_token(made_root: Path, live_part: str, run: Any) -> None:
    first = run("show", made_root, live_part, "--position", 0, "--top", 3, "--json").json()
    assert [a["rank"] for a in first["alternatives"]] == [1, 2, 3, None]
    assert [a["sampled"] for a in first["alternatives"]] == [False, False, False, True]
    assert [p["position"] for p in first["positions"]] == [0]
    second = run("show", made_root, live_part, "--position", 1, "--json").json()
    assert [a["sampled"] for a in second["alternatives"]] == [True, *[False] * 7]
    out = run("show", made_root, live_part, "--position", 1).out
    assert sum("<- sampled" in line for line in out.splitlines()) == 1
    assert "all other tokens: probability" in out


def test_unscored_part_shows_what_is_known(made_root: Path, run: Any) -> None:
    part = "v000000-0000000000000004"
    value = run("show", made_root, part, "--position", 0, "--json").json()
    assert (value["scored"], value["alternatives"]) == (False, None)
    assert value["positions"][0]["logprob"] is None
    assert value["positions"][0]["behaviour_logprob"] == -0.5
    out = run("show", made_root, part).out
    assert "not scored yet" in out
    assert "teacher logprob" not in out


def test_part_by_its_beginning_or_the_last_in_use(made_root: Path, run: Any) -> None:
    assert run("show", made_root, "--json").json()["part"].endswith("1")
    assert run("show", made_root, "v000000-0000000000000003", "--json").json()["rows"] == 4
    ambiguous = run("show", made_root, "v000000")
    assert ambiguous.status == 2
    assert "4 that begin so" in ambiguous.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--row", 4], "row 0 to 3; got 4"),
        (["--row", -1], "row, top, position"),
        (["--position", 99], "Choose another --position"),
        (["--top", 0], "row, top, position"),
    ],
)
def test_out_of_range(
    made_root: Path, live_part: str, flags: list[Any], message: str, run: Any
) -> None:
    ran = run("show", made_root, live_part, *flags)
    assert ran.status == 2
    assert message in ran.err


def test_empty_cache_has_nothing_to_show(damaged: Path, run: Any) -> None:
    for path in [*damaged.glob("rollouts/*"), *damaged.glob("commits/*/*")]:
        path.unlink()
    assert run("show", damaged).status == 2
    assert run("status", damaged).status == 0
    assert run("ls", damaged, "--json").json() == []
