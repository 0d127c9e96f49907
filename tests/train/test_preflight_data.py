"""What `run` refuses of the further data of its training, before anything is paid for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError, InputError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.teacher import TeacherConfig
from stillroom.replay.config import StreamConfig
from stillroom.replay.prompts import PromptsConfig
from stillroom.train.config import ReplayConfig
from stillroom.train.phases import Phase
from stillroom.train.preflight_data import check_held_out, check_phases
from stillroom.train.run_config import RunConfig
from stillroom.train.supervised_data import SupervisedConfig

REPLAY = StreamConfig(batch_rows=12, max_tokens=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def student(student_dir: Path) -> ModelFiles:
    """The tiny student."""
    return inspect_model(str(student_dir))


def config(**train: Any) -> RunConfig:
    """Settings of a run on a cache that is yet to be made."""
    return RunConfig(
        root="root",
        output="output",
        student="student",
        teacher=TeacherConfig(model="teacher"),
        prompts=PromptsConfig(source="prompts.jsonl"),
        held_out=PromptsConfig(source="held_out.jsonl"),
        train=ReplayConfig(**({"replay": REPLAY} | train)),
    )


def empty(cache: Cache, root: Path) -> str:
    """A cache of the same identity without a row."""
    Cache.create(root, cache.identity)
    return str(root)


def test_datasets_of_phases(
    student: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\n')
    text = SupervisedConfig(source=str(path), column="text", batch_rows=2)

    def check(settings: SupervisedConfig) -> None:
        check_phases(config(phases=(Phase(supervised=settings),)), student)

    check(text)
    with pytest.raises(InputError, match="a column messages"):
        check(replace(text, column="messages"))
    with pytest.raises(InputError, match=r"supervised\.batch_rows: expected at most the 2 rows"):
        check(replace(text, batch_rows=3))


def test_caches_of_phases(student: ModelFiles, cache: Cache, tmp_path: Path) -> None:
    def check(root: str, **train: Any) -> None:
        check_phases(config(phases=(Phase(), Phase(root=root)), **train), student)

    root = str(cache.storage.folder)
    before = set(cache.storage.folder.rglob("*"))
    check(root)
    assert set(cache.storage.folder.rglob("*")) == before, "nothing is written"
    check("./root/")
    with pytest.raises(MissingError, match="nowhere"):
        check(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="an empty snapshot"):
        check(empty(cache, tmp_path / "empty"))
    with pytest.raises(InputError, match=r"replay\.batch_rows: expected at most the 12 rows"):
        check(root, replay=replace(REPLAY, batch_rows=13))
    with pytest.raises(ConfigError, match=r"train\.phases, item 1, root: .*measure on"):
        check(root, eval_root=root + "/")


def test_the_held_out_cache(cache: Cache, tmp_path: Path) -> None:
    def check(root: str, **train: Any) -> None:
        check_held_out(config(eval_root=root, **train), cache.identity)

    root = str(cache.storage.folder)
    check_held_out(config(), cache.identity)
    check(root)
    with pytest.raises(MissingError, match="nowhere"):
        check(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"train\.eval_root: expected another cache"):
        check("./root")
    with pytest.raises(InputError, match="an empty snapshot"):
        check(empty(cache, tmp_path / "empty"))
    with pytest.raises(InputError, match=r"replay\.max_tokens: .*21 tokens; got 8"):
        check(root, replay=replace(REPLAY, max_tokens=8))
    other = replace(cache.identity, topk=4)
    with pytest.raises(MismatchError, match="topk"):
        check_held_out(config(eval_root=root), other)
