"""Settings from YAML: values arrive, and every mistake is named with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.cache.teacher import ScoreSpec
from stillroom.replay.row_filter import RowFilter
from stillroom.train.config import ReplayConfig
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings, load_yaml

MINIMAL = """
root: cache
output: out
student: s
teacher: {model: t}
prompts: {source: p.jsonl}
held_out: {source: h.jsonl}
"""


def write(tmp_path: Path, text: str) -> str:
    """A YAML file."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_values_and_defaults(tmp_path: Path) -> None:
    """Nested values are taken, all else is the default; 2e-4 is a number though YAML says text."""
    text = MINIMAL + "train: {learning_rate: 2e-4, num_train_epochs: 3, replay: {batch_rows: 8}}\n"
    config: RunConfig = load_yaml(RunConfig, write(tmp_path, text))
    assert config.train.learning_rate == 2e-4
    assert config.train.num_train_epochs == 3.0
    assert config.train.replay.batch_rows == 8
    assert config.train.replay.seed == 0
    assert config.teacher.model == "t"
    assert config.rounds == 2


def test_what_the_teacher_keeps(tmp_path: Path) -> None:
    text = MINIMAL + "topk: 9\nmass: 0.9\nextra: 3\nextra_kind: student\nsampler: {extra: 2}\n"
    config: RunConfig = load_yaml(RunConfig, write(tmp_path, text))
    assert config.score_spec == ScoreSpec(topk=9, mass=0.9, extra=3, extra_kind="student")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "tran: {}\n", "'tran'.*Did you mean 'train'"),
        (MINIMAL + "train: {learning_rat: 1.0}\n", "'learning_rat'.*Did you mean 'learning_rate'"),
        (MINIMAL + "zzzzzz: 1\n", "'zzzzzz'.*Known keys: root"),
        (MINIMAL + "rounds: two\n", "'rounds'.*int.*'two'"),
        (MINIMAL + "rounds: true\n", "'rounds'.*int.*True"),
        (MINIMAL + "rounds: 1.5\n", "'rounds'.*int.*1.5"),
        (MINIMAL + "rounds: 0\n", "rounds.*at least 1"),
        (MINIMAL + "train: 3\n", "'train'.*key: value"),
        (MINIMAL + "train: {kind: jsd}\n", "train.beta.*excluded"),
        (MINIMAL + "train: {kind: jsd, beta: 1.0}\n", "train.beta.*excluded"),
        (MINIMAL + "train: {kind: sideways}\n", "train.kind.*one of"),
        (MINIMAL + "train: {beta: 0.5}\n", "train.beta.*forward takes none"),
        (MINIMAL + "train: {num_train_epochs: 0}\n", "train.num_train_epochs.*above 0"),
        (MINIMAL + "sampler: {extra: 2}\n", "sampler.extra.*at most 0.*; got 2"),
        (
            MINIMAL + "extra: 1\nextra_kind: student\nsampler: {extra: 2}\n",
            "sampler.extra.*at most 1.*; got 2",
        ),
        (MINIMAL + "sampler: {temperature: 0}\n", "sampler.temperature"),
        (MINIMAL + "prompts: {source: p, column: body}\n", "prompts.column.*one of"),
        (MINIMAL.replace("output: out", "output: cache"), "output.*another folder"),
        (MINIMAL.replace("root: cache", "root: s3://bucket/x"), "root.*a folder"),
        ("root: cache\n", "'output'.*a value.*Add output"),
        ("- 1\n- 2\n", "key: value"),
        ("a: [1\n", "YAML"),
        ("", "key: value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    """Unknown keys name the nearest known one; values name what they should be."""
    with pytest.raises(ConfigError, match=message):
        load_yaml(RunConfig, write(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    """A path that is not there is said to be so."""
    with pytest.raises(MissingError, match=r"no\.yaml"):
        load_yaml(RunConfig, str(tmp_path / "no.yaml"))


def test_optional_takes_nothing_or_a_value() -> None:
    """None and a value both fit an optional setting."""
    assert build_settings(ReplayConfig, {"beta": None}, "x").beta is None
    assert build_settings(ReplayConfig, {"kind": "jsd", "beta": 0.1}, "x").param == 0.1


@dataclass(frozen=True)
class Nested:
    """Settings with lists of settings."""

    filters: tuple[RowFilter, ...] = ()
    pair: tuple[int, str] = (0, "")
    shares: dict[str, float] = field(default_factory=dict)


def test_lists_and_mappings(tmp_path: Path) -> None:
    """A YAML list becomes a tuple, and what is inside either is converted like any value."""
    text = """
max_lag: 3
finish_reasons: [stop, length]
exclude_rollouts: [18446744073709551615, 2]
ranges: {x_reward: [2e-1, null], prompt_length: [1, 9]}
"""
    found = load_yaml(RowFilter, write(tmp_path, text))
    assert found == RowFilter(
        max_lag=3,
        finish_reasons=("stop", "length"),
        exclude_rollouts=(2**64 - 1, 2),
        ranges={"x_reward": (0.2, None), "prompt_length": (1.0, 9.0)},
    )
    nested = load_yaml(Nested, write(tmp_path, "filters: [{max_lag: 1}, {}]\npair: [4, a]\n"))
    assert nested == Nested((RowFilter(max_lag=1), RowFilter()), (4, "a"))
    assert load_yaml(Nested, write(tmp_path, "shares: {a: 1}\n")).shares == {"a": 1.0}


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (RowFilter, "finish_reasons: stop\n", r"'finish_reasons'.*a list; got 'stop'.*\[a, b\]"),
        (RowFilter, "sources: {student: 1}\n", "'sources'.*a list; got {"),
        (RowFilter, "prompt_ids: [1, 2, 3.5]\n", r"'prompt_ids', item 2: expected int; got 3\.5"),
        (RowFilter, "prompt_ids: [true]\n", "'prompt_ids', item 0.*int; got True"),
        (RowFilter, "ranges: [x_a]\n", "'ranges'.*key: value; got"),
        (RowFilter, "ranges: {x_a: 3}\n", "'ranges', key 'x_a'.*a list; got 3"),
        (RowFilter, "ranges: {x_a: [1]}\n", r"'ranges', key 'x_a'.*a list of 2; got \[1\]"),
        (RowFilter, "ranges: {x_a: [1, b]}\n", "key 'x_a', item 1.*float or nothing; got 'b'"),
        (RowFilter, "ranges: {1: [1, 2]}\n", "'ranges', key 1.*str; got 1"),
        (RowFilter, "ranges: {x_a: [2, 1]}\n", "rows.ranges, 'x_a'.*lowest, 2.0; got 1.0"),
        (Nested, "filters: [{}, {max_lg: 1}]\n", "'filters', item 1, key 'max_lg'.*'max_lag'"),
        (Nested, "filters: {max_lag: 1}\n", "'filters'.*a list"),
        (Nested, "pair: [a, 4]\n", "'pair', item 0: expected int; got 'a'"),
        (Nested, "shares: {a: []}\n", "'shares', key 'a'.*float"),
    ],
)
def test_mistakes_in_lists_and_mappings(
    tmp_path: Path, cls: type[Any], text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(cls, write(tmp_path, text))
