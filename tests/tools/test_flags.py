"""Settings from a file and from flags: flags win, and either may hold what is required."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, MissingError
from stillroom.tools.flags import parse_flags, parse_with_file
from stillroom.tools.jobs import RolloutJob, ScoreJob, TrainJob
from stillroom.tools.looks import Show
from stillroom.train.config import ReplayConfig


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a YAML file; returns its path."""

    def write_text(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return str(path)

    return write_text


def test_flags_win_over_the_file(write: Any) -> None:
    path = write(
        "root: r\noutput: o\nrun_name: a\ntrain:\n  num_train_epochs: 3\n  learning_rate: 2e-4\n"
    )
    job = parse_with_file(
        TrainJob, [path, "--run-name", "b", "--train.num-train-epochs", "0.5"], "p"
    )
    train = ReplayConfig(num_train_epochs=0.5, learning_rate=2e-4)
    assert job == TrainJob(root="r", output="o", run_name="b", train=train)


def test_either_may_hold_what_is_required(write: Any) -> None:
    path = write("prompts: {source: p.jsonl}\nsampler: {top_p: 0.5}\n")
    job = parse_with_file(RolloutJob, [path, "--root", "r"], "p")
    assert (job.root, job.prompts.source, job.sampler.top_p) == ("r", "p.jsonl", 0.5)
    assert (
        parse_with_file(RolloutJob, ["--root", "r", "--prompts.source", "p.jsonl"], "p").root == "r"
    )


def test_ranges_are_checked_once_file_and_flags_are_together(write: Any) -> None:
    path = write("root: r\noutput: o\nrun_name: a\ntrain: {kind: jsd}\n")
    assert parse_with_file(TrainJob, [path, "--train.beta", "0.5"], "p").train.beta == 0.5
    with pytest.raises(ConfigError, match=r"train\.beta: expected a weight"):
        parse_with_file(TrainJob, [path], "p")


def test_null_and_true_in_a_file(write: Any) -> None:
    path = write("root: r\nteacher: {model: t, revision: null}\naccept_numerics: true\n")
    job = parse_with_file(ScoreJob, [path], "p")
    assert (job.teacher.revision, job.accept_numerics, job.topk) == (None, True, None)
    assert not parse_with_file(ScoreJob, [path, "--no-accept-numerics"], "p").accept_numerics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rooot: r", "Did you mean 'root'"),
        ("teacher: {modell: t}", "Did you mean 'model'"),
        ("root: 3", "expected str; got 3"),
        ("teacher: t", "settings of TeacherConfig"),
        ("- root", "settings of ScoreJob"),
        ("root: [", "expected YAML"),
        ("", "settings of ScoreJob"),
    ],
)
def test_files_that_cannot_be_used(text: str, message: str, write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_with_file(ScoreJob, [write(text), "--root", "r", "--teacher.model", "t"], "p")
    assert message in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(MissingError):
        parse_with_file(ScoreJob, ["nowhere.yaml"], "p")


def test_missing_required_setting_exits_2_and_names_it(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_with_file(ScoreJob, [write("root: r")], "stillroom score")
    assert stop.value.code == 2
    assert "--teacher.model" in capsys.readouterr().err


def test_refused_values_are_raised_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"run_name: expected letters.*got 'a b'"):
        parse_with_file(TrainJob, ["--root", "r", "--output", "o", "--run-name", "a b"], "p")
    nested = ["--root", "r", "--teacher.model", "t", "--teacher.dtype", "int8"]
    with pytest.raises(ConfigError, match=r"teacher\.dtype: expected one of"):
        parse_with_file(ScoreJob, nested, "p")
    assert capsys.readouterr().err == ""


def test_positions_of_a_looking_command() -> None:
    assert parse_flags(Show, ["r", "--row", "2"], "p") == Show(root="r", row=2)
    assert parse_flags(Show, ["r", "v0", "--json"], "p") == Show(root="r", part="v0", json=True)


def test_arguments_of_an_optimiser_come_from_flags_too() -> None:
    flags = ["--optimizer-args", "betas", "0.9", "0.95", "eps", "1e-4", "fused", "True"]
    made = parse_flags(ReplayConfig, flags, "p").optimizer_args
    assert made == {"betas": (0.9, 0.95), "eps": 1e-4, "fused": True}
    assert made["fused"] is True


def test_arguments_of_an_engine_are_one_json_object(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "--teacher.vllm.engine-args"
    flags = ["--root", "r", "--teacher.model", "t", named]
    given = parse_with_file(ScoreJob, [*flags, '{"seed": 1, "nested": {"a": [true]}}'], "p")
    assert given.teacher.vllm.engine_args == {"seed": 1, "nested": {"a": [True]}}
    text = "root: r\nteacher: {model: t, vllm: {engine_args: {seed: 1, nested: {a: [true]}}}}\n"
    assert parse_with_file(ScoreJob, [write(text)], "p") == given
    assert parse_with_file(ScoreJob, [write(text), named, "{}"], "p").teacher.vllm.engine_args == {}
    for bad in ("[1]", "seed=1"):
        with pytest.raises(SystemExit) as stop:
            parse_with_file(ScoreJob, [*flags, bad], "p")
        assert stop.value.code == 2
    assert "a JSON object such as" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no model; got model"):
        parse_with_file(ScoreJob, [*flags, '{"model": "m"}'], "p")
    with pytest.raises(ConfigError, match=r"'engine_args'.*Write it as"):
        parse_with_file(ScoreJob, [write("teacher: {vllm: {engine_args: [1]}}")], "p")
