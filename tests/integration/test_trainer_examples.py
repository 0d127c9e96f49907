"""The examples for other trainers run, learn, and go on where they stopped."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "trainers"
STEPS = 9
SAVE = {"save_every": 4, "learning_rate": 0.01}
LOG: dict[str, Any] = {"logging_steps": 1, "learning_rate": 0.01, "save_steps": 4}
SMALL = StreamConfig(batch_rows=8, max_tokens=64, threads=1)
"""Several micro-batches a step."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> str:
    """A cache of 24 rows: three steps an epoch."""
    return str(make_cache(tmp_path_factory.mktemp("trainers") / "cache", rows=24).storage.root)


@pytest.fixture
def bare_loop() -> Callable[..., Any]:
    """The loop of one example."""
    return load("bare_loop.py", "train", SMALL)


def load(script: str, name: str, config: StreamConfig) -> Callable[..., Any]:
    """A function of an example, which then replays with these settings."""
    function: Any = runpy.run_path(str(EXAMPLES / script))[name]
    function.__globals__["REPLAY"] = config
    return function  # type: ignore[no-any-return]


def weights(output: Path) -> dict[str, bytes]:
    """Of the trained student."""
    tensors = load_file(output / "student" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def logged_losses(output: Path) -> list[float]:
    """What the Trainer logged, in its last checkpoint."""
    history = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in history["log_history"] if "loss" in entry]


def assert_falls(losses: list[float]) -> None:
    """By a quarter at least, from the first epoch to the third."""
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_a_bare_loop_learns_and_resumes_to_the_bit(
    student_dir: Path, root: str, tmp_path: Path, bare_loop: Callable[..., Any]
) -> None:
    whole = list(bare_loop(str(student_dir), root, tmp_path / "whole", STEPS, **SAVE))
    assert_falls(whole)
    run = bare_loop(str(student_dir), root, tmp_path / "cut", STEPS, **SAVE)
    assert [next(run) for _ in range(6)] == whole[:6]
    run.close()
    rest = list(bare_loop(str(student_dir), root, tmp_path / "cut", STEPS, **SAVE))
    assert rest == whole[4:]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert list(bare_loop(str(student_dir), root, tmp_path / "cut", STEPS, **SAVE)) == []


def test_a_bare_loop_leaves_a_whole_model(
    student_dir: Path, root: str, tmp_path: Path, bare_loop: Callable[..., Any]
) -> None:
    """Also where transformers would not save its generation settings."""
    student = shutil.copytree(student_dir, tmp_path / "student")
    settings = student / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"top_p": 0.6}))
    list(bare_loop(str(student), root, tmp_path / "out", 1, **SAVE))
    saved, given = inspect_model(str(tmp_path / "out" / "student")), inspect_model(str(student))
    assert saved.tokenizer_fingerprint == given.tokenizer_fingerprint
    assert saved.fingerprint != given.fingerprint
    assert (saved.folder / settings.name).read_bytes() == settings.read_bytes()


def test_the_trainer_of_transformers_learns_and_resumes(
    student_dir: Path, root: str, tmp_path: Path, bare_loop: Callable[..., Any]
) -> None:
    main = load("hf_trainer.py", "main", SMALL)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(str(student_dir), root, whole, max_steps=STEPS, **LOG)
    losses = logged_losses(whole)
    assert_falls(losses)
    bare = list(bare_loop(str(student_dir), root, tmp_path / "bare", 1, **SAVE))
    assert losses[:1] == pytest.approx(bare, rel=1e-4)
    shutil.copytree(whole, cut)
    for step in (8, STEPS):
        shutil.rmtree(cut / f"checkpoint-{step}")
    main(str(student_dir), root, cut, max_steps=STEPS, **LOG)
    assert logged_losses(cut) == losses
    assert weights(cut) == weights(whole)


class OnTwoGpus(TrainingArguments):
    """Those of a machine where Trainer finds two."""

    def __post_init__(self) -> None:
        """Find them."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._n_gpu = 2


def test_the_trainer_of_transformers_never_cuts_packed_rows_up(
    student_dir: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DataParallel would, where several GPUs are seen without a launcher."""
    main = load("hf_trainer.py", "main", SMALL)
    monkeypatch.setitem(main.__globals__, "TrainingArguments", OnTwoGpus)
    main(str(student_dir), root, tmp_path / "out", max_steps=1, **LOG)
    saved = tmp_path / "out" / "checkpoint-1" / "training_args.bin"
    args = torch.load(saved, weights_only=False)
    assert isinstance(args, OnTwoGpus)
    assert args.n_gpu == 1


def test_accumulated_steps_are_as_one_of_all_their_rows(
    student_dir: Path, root: str, tmp_path: Path
) -> None:
    halves = StreamConfig(batch_rows=4, max_tokens=64, threads=1)
    for name, config, accumulate in (("whole", SMALL, 1), ("halves", halves, 2)):
        main = load("hf_trainer.py", "main", config)
        settings = LOG | {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0}
        settings |= {"optim": "sgd", "learning_rate": 0.1}  # its steps grow with the gradient
        main(str(student_dir), root, tmp_path / name, max_steps=STEPS, **settings)
    found, expected = logged_losses(tmp_path / "halves"), logged_losses(tmp_path / "whole")
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[3] < 0.95 * found[0], "half a step would show"


def test_runs_of_both_pin_their_own_until_they_end(
    student_dir: Path, tmp_path: Path, bare_loop: Callable[..., Any], make_cache: Any
) -> None:
    """Though their outputs have one name; a run that was stopped goes on with its snapshot."""
    cache = make_cache(tmp_path / "cache", rows=24)
    root = str(cache.storage.root)
    first = cache.snapshot().id

    def pinned() -> list[list[str]]:
        return [pin.snapshots for pin in active_pins(cache.storage).values()]

    outputs = [tmp_path / name / "out" for name in "ab"]
    runs = [bare_loop(str(student_dir), root, output, STEPS, **SAVE) for output in outputs]
    for run in runs:
        for _ in range(5):
            next(run)
    assert pinned() == [[first], [first]]
    assert len(list(runs[1])) == STEPS - 5
    assert pinned() == [[first]]
    runs[0].close()
    make_cache(tmp_path / "cache", rows=24, seed=1)
    main = load("hf_trainer.py", "main", SMALL)
    main(str(student_dir), root, outputs[1], max_steps=1, **LOG)
    assert (outputs[1] / "snapshot.txt").read_text() == cache.snapshot().id != first
    assert pinned() == [[first]]
    rest = bare_loop(str(student_dir), root, outputs[0], STEPS, **SAVE)
    assert len(list(rest)) == STEPS - 4
    assert pinned() == []


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_loop_goes_on_to_the_bit(student_dir: Path, root: str, tmp_path: Path) -> None:
    settings = ["--steps", "150", "--save-every", "1", "--learning-rate", "0.01"]

    def command(output: str) -> list[str]:
        script = str(EXAMPLES / "bare_loop.py")
        return [sys.executable, script, str(student_dir), root, str(tmp_path / output), *settings]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, check=True).stdout
    with subprocess.Popen(command("cut"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        before = [process.stdout.readline() for _ in range(5)]
        process.kill()
    assert process.returncode < 0
    assert not (tmp_path / "cut" / "student").exists()
    after = subprocess.run(command("cut"), capture_output=True, text=True, check=True).stdout
    lines = whole.splitlines(keepends=True)
    assert before == lines[:5]
    assert len(after.splitlines()) >= 1
    assert whole.endswith(after)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.dist
@pytest.mark.slow
def test_the_trainer_may_have_workers(student_dir: Path, root: str, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        script, output = str(EXAMPLES / "hf_trainer.py"), str(tmp_path / workers)
        command = [sys.executable, script, str(student_dir), root, output, "--workers", workers]
        settings = ["--steps", str(STEPS), "--learning-rate", "0.01"]
        subprocess.run([*command, *settings], check=True, capture_output=True)
    assert_falls(logged_losses(tmp_path / "2"))
    assert logged_losses(tmp_path / "2") == logged_losses(tmp_path / "0")
    assert weights(tmp_path / "2") == weights(tmp_path / "0")


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_of_the_trainer_equal_one(student_dir: Path, root: str, tmp_path: Path) -> None:
    settings = ["--steps", str(STEPS), "--learning-rate", "0.01", "--use-cpu"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, before in (("one", []), ("two", launch)):
        script = [str(EXAMPLES / "hf_trainer.py"), str(student_dir), root, str(tmp_path / name)]
        command = [sys.executable, *before, *script, *settings]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert (tmp_path / "two" / f"checkpoint-{STEPS}" / "rng_state_1.pth").exists(), "rank 1's"
    expected = logged_losses(tmp_path / "one")
    assert logged_losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
