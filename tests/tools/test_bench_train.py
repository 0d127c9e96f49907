"""`stillroom bench train`: ways that are compared compute the same loss and gradients, memory is
what a way really takes, and programs take turns; and the page on TRL names settings that exist."""

import ast
import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.errors import InputError, MissingError
from stillroom.tools.bench_stream import alone
from stillroom.tools.bench_train_loss import WAYS, YARDSTICK, Settings, Shape, measure_way
from stillroom.tools.bench_train_rows import Sizes, prepare
from stillroom.tools.bench_train_turns import Program, Turn, take_turns
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings

SMALL = Shape(tokens=24, vocab=300, width=16, topk=8)
MEASURED = Shape(tokens=512, vocab=20_000, width=16, topk=8)
QUICK = Settings(loss_bytes=1 << 20, threads=1, seconds=0.0)
EQUAL = (
    ("cross-entropy", "chunked cross-entropy"),
    ("plain reference, forward KL", "fused, forward KL"),
    ("dense teacher, forward KL", "TRL chunked, forward KL"),
    ("TRL chunked, JSD", "Liger chunked, JSD"),
)
PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
TINY = Sizes(rows=4, prompt=12, completion=6, topk=8)


@pytest.fixture(autouse=True)
def _children_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAGE.parents[1]))


def test_ways_of_one_loss_agree_and_memory_is_seen() -> None:
    own = tuple(way.name for way in WAYS if not way.package)
    losses, gaps, grown = alone(compare, own)
    assert set(gaps) == set(EQUAL[:2])
    assert max(gaps.values()) < 1e-4
    for name in ("fused, forward KL", "fused, reverse KL", "fused, JSD"):
        assert losses[name] > 0
    assert losses["dense teacher, forward KL"] > losses["fused, forward KL"]
    logits_mb = MEASURED.logits_bytes / 2**20
    assert grown["cross-entropy"] > 2 * logits_mb
    assert grown["fused, forward KL"] < logits_mb / 2


def test_the_recipe_is_a_run() -> None:
    (recipe,) = re.findall(
        r"^```yaml\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    made = build_settings(RunConfig, yaml.safe_load(recipe), "recipe")
    assert (made.rounds, made.train.replay.batch_rows) == (20, 64)


@pytest.mark.slow
def test_other_packages_compute_the_same() -> None:
    losses, gaps, _ = alone(compare, tuple(way.name for way in WAYS if way.installed))
    assert gaps
    assert max(gaps.values()) < 1e-3, gaps
    assert losses["dense teacher, forward KL"] > losses["fused, forward KL"]


def compare(names: tuple[str, ...]) -> tuple[dict[str, float], dict[Any, float], dict[str, float]]:
    """Losses on a small problem; how far those that should be equal are apart, gradients too; and
    what some grow by, MiB."""
    import torch

    from stillroom.tools.bench_train_data import made_up_problem
    from stillroom.tools.bench_train_loss import growth_mb
    from stillroom.tools.bench_train_ways import COMPUTE, Chunks

    torch.set_num_threads(1)
    problem, chunks = made_up_problem(SMALL), Chunks(QUICK.loss_bytes, 7)
    found: dict[str, tuple[Any, ...]] = {}
    for name in names:
        problem.hidden.grad = problem.weight.grad = None
        loss = COMPUTE[name](problem, chunks)
        loss.backward()  # type: ignore[no-untyped-call]
        assert problem.hidden.grad is not None
        assert problem.weight.grad is not None
        found[name] = (loss.detach(), problem.hidden.grad, problem.weight.grad)
    gaps = {
        pair: max(
            float((one - other).norm() / other.norm())
            for one, other in zip(found[pair[0]], found[pair[1]], strict=True)
        )
        for pair in EQUAL
        if set(pair) <= found.keys()
    }
    problem = made_up_problem(MEASURED)

    def run(name: str) -> None:
        COMPUTE[name](problem, chunks).backward()  # type: ignore[no-untyped-call]

    grown = {
        name: growth_mb(partial(run, name))[0] for name in ("fused, forward KL", "cross-entropy")
    }
    return {name: float(value[0]) for name, value in found.items()}, gaps, grown


@pytest.mark.slow
def test_a_way_is_measured_beside_the_yardstick() -> None:
    found = alone(measure_way, YARDSTICK, SMALL, QUICK)
    assert (found.name, found.tokens, found.vocab) == (YARDSTICK.name, 24, 300)
    assert found.rounds == 1
    assert found.ratio > 0 < found.seconds
    assert not found.computed


def test_programs_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    programs = [
        Program(name, f"{__name__}.{write_name.__name__}", (name, str(log))) for name in "ab"
    ]
    taken = take_turns(programs, 3, lambda: None, warm_up=1)
    assert log.read_text() == "abababab"
    assert {name: len(notes) for name, notes in taken.items()} == {"a": 3, "b": 3}
    assert all(note["seconds"] > 0 and note["letters"] == 2 for note in taken["a"])


def write_name(turn: Turn, name: str, log: str) -> None:
    """A program that writes its name in its turn."""
    while turn.next():
        with open(log, "a") as out:
            out.write(name)
        turn.note("letters", 1)
        turn.note("letters", 1)


def test_a_program_of_two_processes_takes_as_long_as_the_slower_one() -> None:
    program = Program("two", f"{__name__}.{note_rank.__name__}", world=2, threads=1)
    taken = take_turns([program], 1, lambda: None, warm_up=0)
    assert taken["two"][0]["seconds"] >= 0.2
    assert taken["two"][0]["rank"] == 1


def note_rank(turn: Turn) -> None:
    """A program whose second process is slow."""
    import time

    assert os.environ["RANK"] == str(turn.rank)
    assert os.environ["WORLD_SIZE"] == str(turn.world) == "2"
    while turn.next():
        time.sleep(0.2 * turn.rank)
        turn.note("rank", turn.rank)


def test_what_a_program_raises_ends_all(tmp_path: Path) -> None:
    fine = Program("fine", f"{__name__}.{write_name.__name__}", ("a", str(tmp_path / "log")))
    broken = Program("broken", f"{__name__}.{refuse.__name__}")
    with pytest.raises(InputError, match="rows"):
        take_turns([fine, broken], 1, lambda: None)


def refuse(turn: Turn) -> None:
    """A program that fails in its first step."""
    turn.next()
    raise InputError("rows", "some", "none", "Add some.")


@pytest.mark.parametrize(
    "flags",
    [("--part", "loss", "--tokens", "0"), ("--steps", "0"), ("--vocab-sizes", "32"), ("a-root",)],
)
def test_settings_out_of_range_are_refused(run: Any, flags: tuple[str, ...]) -> None:
    assert run("bench", "train", *flags).status == 2


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"prepare\.py"):
        prepare(tmp_path, tmp_path / "made", TINY)


@pytest.mark.slow
def test_losses_are_measured_and_printed(run: Any) -> None:
    flags = ("--tokens", "64", "--vocab-sizes", "500", "--width", "16", "--topk", "8")
    ran = run("bench", "train", "--part", "loss", *flags, "--seconds", "0", "--no-peers", "--json")
    assert ran.status == 0, ran.err
    rows = ran.json()["loss"]
    assert [row["name"] for row in rows] == [way.name for way in WAYS if not way.package]
    assert all(row["seconds"] > 0 and row["loss"] > 0 for row in rows)


@pytest.mark.slow
def test_steps_are_measured_and_printed(tmp_path: Path, run: Any) -> None:
    from tests.conftest import save_llama

    save_llama(tmp_path / "teacher", seed=1, layers=4)
    for name in ("prompts.jsonl", "held_out.jsonl"):
        rows = [{"messages": [{"role": "user", "content": f"{i} abc" * 4}]} for i in range(30)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--models", tmp_path, "--step-tokens", "12", "6", "--topk", "8", "--steps", "2")
    ran = run("bench", "train", "--part", "step", *flags, "--json")
    assert ran.status == 0, ran.err
    step = ran.json()["step"]
    names = [row["name"] for row in step["programs"]]
    assert ("TRL, live teacher" in names) == (find_spec("trl") is not None)
    assert all(row["steps"] == 2 and row["seconds"] > 0 for row in step["programs"])
    costs = [cost["seconds"] for cost in step["amortised"]]
    assert costs == sorted(costs, reverse=True)
    ran = run("bench", "train", "--part", "ranks", *flags)
    assert ran.status == 0, ran.err
    assert "two processes / one process" in ran.out


def rows_of_page() -> Iterator[tuple[str, list[str], str]]:
    """TRL's name, ours, and how they are related, row by row of the page's tables."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            yield cells[0].strip("`"), re.findall(r"`([^`]+)`", cells[1]), cells[2]


def field_type(path: str) -> Any:
    """Type of a setting of `run`, by its dotted path; None if there is no such setting."""
    cls: Any = RunConfig
    for name in path.split("."):
        members = typing.get_args(cls) if isinstance(cls, types.UnionType) else (cls,)
        (cls,) = [member for member in members if member is not type(None)]
        if not dataclasses.is_dataclass(cls):
            return None
        cls = typing.get_type_hints(cls).get(name)
        if cls is None:
            return None
    return cls


def test_every_setting_on_the_page_exists() -> None:
    named = {path for _, paths, _ in rows_of_page() for path in paths}
    for token in re.findall(r"`((?:train|sampler|teacher|refresh|prompts)\.[a-z0-9_.]+)", page()):
        named.add(token)
    assert len(named) > 50
    assert [path for path in sorted(named) if field_type(path) is None] == []
    assert field_type("train.replay.nothing") is None


def page() -> str:
    """The page on TRL."""
    return PAGE.read_text()


def test_rows_of_the_page_say_what_they_are() -> None:
    kinds = {"same name", "other name", "not needed", "not there"}
    for name, paths, kind in rows_of_page():
        assert kind in kinds, name
        assert bool(paths) == kind.endswith("name"), name
        if kind == "same name":
            assert [path.rpartition(".")[2] for path in paths] == [name]
        if kind == "other name":
            assert name not in [path.rpartition(".")[2] for path in paths if path.count(".") > 1]


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_every_setting_of_trls_own_is_on_the_page_once() -> None:
    own = fields_of("trl", "trainer/distillation_config.py", "DistillationConfig")
    sections = page().split("\n## ")
    table = next(text for text in sections if text.startswith("DistillationConfig's own"))
    assert re.findall(r"^\| `(\w+)`", table, re.M) == own
    inherited = fields_of("transformers", "training_args.py", "TrainingArguments")
    table = next(text for text in sections if text.startswith("Of TrainingArguments"))
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) <= set(inherited)


def fields_of(package: str, file: str, name: str) -> list[str]:
    """Fields of a dataclass of an installed package, in order, without importing it."""
    spec = find_spec(package)
    assert spec is not None
    (folder,) = spec.submodule_search_locations or []
    tree = ast.parse((Path(folder) / file).read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return [n.target.id for n in found.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]
