"""The loop: one normaliser however rows are split, resume to the bit, no step on bad numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from stillroom.cache.errors import ConfigError, MismatchError, NumericsError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.pins import active_pins
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.policies import register_initial
from stillroom.train.config import LoraSettings, ReplayConfig
from stillroom.train.objectives import divergence
from stillroom.train.phases import Phase
from stillroom.train.report import TrainReport
from stillroom.train.run_snapshot import pin_name, snapshot_for
from stillroom.train.step import backward
from stillroom.train.student import to_target
from stillroom.train.trainer import ReplayTrainer

REPLAY = StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4)
CONFIG = ReplayConfig(
    device="cpu",
    learning_rate=1e-2,
    num_train_epochs=3,
    drift_every_steps=2,
    lr_scheduler_type="cosine",
    replay=REPLAY,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> Cache:
    """Twelve scored rollouts."""
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def grouped(
    tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]
) -> dict[bool, Cache]:
    """Twenty-four scored rollouts, four of each prompt; all of whose tokens count, or a third."""
    roots = {masked: tmp_path_factory.mktemp("grouped") for masked in (False, True)}
    return {m: make_cache(root, rows=24, samples=4, masked=m) for m, root in roots.items()}


def trainer(
    cache: Cache, student_dir: Path, output: Path, config: ReplayConfig = CONFIG, run: str = "r"
) -> ReplayTrainer:
    """A trainer of the tiny student, as policy 0."""
    settings: dict[str, Any] = {"policy_version": 0, "output": output, "run": run}
    return ReplayTrainer(student_dir, cache, config, snapshot=cache.snapshot(), **settings)


def gradient(made: ReplayTrainer, steps: int = 1) -> tuple[list[float], torch.Tensor]:
    """Losses of steps in float64 and the summed gradient, without an optimiser step."""
    made.student.double()
    batches = [made.stream.next_batch() for _ in range(steps)]
    losses = [backward(made.parallel, made.loss, [batch]).loss for batch in batches]
    grads = [p.grad.flatten() for p in made.student.parameters() if p.grad is not None]
    return losses, torch.cat(grads)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_split_into_micro_batches_does_not_matter(
    cache: Cache, student_dir: Path, tmp_path: Path, kind: str
) -> None:
    """One micro-batch of six rows, and one row each, give the same loss and gradient."""
    param = 0.3 if kind == "jsd" else None
    found = []
    for max_tokens in (4096, 64, 30):
        replay = replace(REPLAY, max_tokens=max_tokens)
        config = replace(CONFIG, kind=kind, beta=param, replay=replay)
        made = trainer(cache, student_dir, tmp_path, config)
        found.append((gradient(made, 2), made))
    sizes = [len(made.stream.next_batch().micro_batches) for _, made in found]
    assert sizes[0] == 1
    assert sizes[2] > sizes[1] > 1
    (losses, grad), _ = found[0]
    for (other_losses, other_grad), _ in found[1:]:
        assert other_losses == pytest.approx(losses, abs=1e-12)
        assert (other_grad - grad).abs().max() < 1e-12


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("over_long", "max_tokens"), [("refuse", 64), ("truncate", 18), ("truncate", 11), ("skip", 16)]
)
def test_shared_prompts_change_neither_loss_nor_gradient(
    grouped: dict[bool, Cache],
    student_dir: Path,
    tmp_path: Path,
    over_long: str,
    max_tokens: int,
    masked: bool,
) -> None:
    replay = replace(REPLAY, batch_rows=8, group_rows=4, over_long=over_long, max_tokens=max_tokens)
    found, tokens = [], []
    for share in (False, True):
        config = replace(CONFIG, replay=replace(replay, share_prompts=share))
        made = trainer(grouped[masked], student_dir, tmp_path, config)
        found.append(gradient(made, 2))
        batch = made.stream.next_batch()
        tokens.append(sum(len(m.token) for m in batch.micro_batches if m is not None))
    (losses, grad), (other_losses, other_grad) = found
    assert other_losses == pytest.approx(losses, abs=1e-6)
    assert (other_grad - grad).norm() < 1e-6 * grad.norm()
    assert tokens[1] < tokens[0]


def test_loss_is_the_mean_over_all_positions(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    """A step's loss is the sum over its positions divided by their number."""
    made = trainer(cache, student_dir, tmp_path)
    batch = made.stream.next_batch()
    values = [
        divergence(made.student(m), to_target(m, torch.device("cpu"))).detach()
        for m in batch.micro_batches
        if m is not None
    ]
    found = backward(made.parallel, made.loss, [batch])
    assert found.loss == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)
    assert len(torch.cat(values)) == batch.num_positions == found.count.positions


def test_loss_falls_and_drift_grows(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """Training lowers the loss on what it replays, and leaves drift records in the cache."""
    made = trainer(cache, student_dir, tmp_path, replace(CONFIG, num_train_epochs=8), run="falls")
    report = made.train()
    assert report.steps == 16
    assert report.rows == 96
    assert report.positions == 8 * cache.snapshot().positions
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert report.drift["0"]["lag"] == 0
    run = pin_name(tmp_path, "falls")
    assert sum(f"drift/{run}-" in entry.path for entry in cache.storage.list("drift")) == 8
    assert (tmp_path / "tensorboard" / "falls").is_dir()


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resume_continues_to_the_bit(
    cache: Cache, student_dir: Path, tmp_path: Path, stop_at: int
) -> None:
    """A run that stopped after a checkpoint ends with the weights of one that did not."""
    config = replace(CONFIG, save_steps=1)
    whole = trainer(cache, student_dir, tmp_path / "whole", config)
    whole_report = whole.train()
    stopped = trainer(cache, student_dir, tmp_path / "stopped", config)
    real_step = stopped._take_step

    def step_or_stop(report: TrainReport) -> None:
        if stopped.step == stop_at:
            raise KeyboardInterrupt
        real_step(report)

    stopped._take_step = step_or_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(cache, student_dir, tmp_path / "stopped", config)
    report = resumed.train()
    assert report.steps == whole_report.steps == 6
    assert report.positions == whole_report.positions
    assert report.losses == whole_report.losses[stop_at:]
    for mine, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_bad_loss_stops_before_the_step(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """A loss that is not finite is an error, and the weights stay as they were."""
    made = trainer(cache, student_dir, tmp_path)
    with torch.no_grad():
        made.student.model.model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in made.student.parameters()]
    with pytest.raises(NumericsError, match=r"finite loss.*a run of another name"):
        made.train()
    for mine, theirs in zip(made.student.parameters(), before, strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_streams_are_closed_where_training_is_interrupted(
    cache: Cache, make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    """That of the run's own cache, and that of a phase on another one."""
    other = make_cache(tmp_path / "other", seed=1).storage.root
    phases = (Phase(max_steps=1), Phase(root=str(other), max_steps=2))
    config = replace(CONFIG, num_train_epochs=1.0, phases=phases)
    made = trainer(cache, student_dir, tmp_path / "run", config)
    real_step = made._take_step

    def step_or_stop(report: TrainReport) -> None:
        if made.step == 2:
            raise KeyboardInterrupt
        real_step(report)

    made._take_step = step_or_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.phases.data(1).stream is not made.stream
    for stream in (made.stream, made.phases.data(1).stream):
        with pytest.raises(ConfigError, match="a closed one"):
            stream.next_batch()


def test_unknown_optimizer(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """A name that torch does not have is refused."""
    for name in ("Adagrid", "lr_scheduler"):
        with pytest.raises(ConfigError, match=r"torch\.optim"):
            trainer(cache, student_dir, tmp_path, replace(CONFIG, optimizer=name))


def test_an_optimizer_that_takes_no_dense_gradient_is_refused_before_anything_is_loaded(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: .*dense gradients"):
        trainer(cache, student_dir, tmp_path, replace(CONFIG, optimizer="SparseAdam"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    """Nothing of what a test does to accelerate's state is left."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerator")
def test_an_accelerator_of_before_changes_nothing(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    """Neither its precision nor its device."""
    alone = trainer(cache, student_dir, tmp_path / "alone").train()
    Accelerator(cpu=True, mixed_precision="bf16")
    PartialState().device = torch.device("cuda", 0)
    made = trainer(cache, student_dir, tmp_path / "after")
    assert made.device == torch.device("cpu")
    assert made.train().losses == alone.losses


def test_what_the_launcher_asked_for_in_vain_is_said_once(
    cache: Cache,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer(cache, student_dir, tmp_path).train()
    line = "  accelerate's launcher asks for FSDP, which is not read here; there is train.parallel"
    assert capsys.readouterr().out.count(line) == 1


def test_run_names_are_checked(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """A name that could not be a path is refused before anything is loaded."""
    with pytest.raises(ConfigError, match="letters, digits"):
        trainer(cache, student_dir, tmp_path, run="../up")


def test_a_stopped_run_goes_on_with_its_snapshot(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    """Scores that came in the meantime wait for the next run; drift counts the whole interval."""
    cache = make_cache(tmp_path / "root")
    first = cache.snapshot()
    config = replace(CONFIG, save_steps=1, drift_every_steps=100)
    assert snapshot_for(cache, tmp_path, "r").id == first.id
    stopped = trainer(cache, student_dir, tmp_path, config)
    real_step = stopped._take_step

    def step_or_stop(report: TrainReport) -> None:
        if stopped.step == 3:
            raise KeyboardInterrupt
        real_step(report)

    stopped._take_step = step_or_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    make_cache(tmp_path / "root", seed=1)
    assert cache.snapshot().id != first.id
    snapshot = snapshot_for(cache, tmp_path, "r")
    assert snapshot.id == first.id
    made = ReplayTrainer(
        student_dir, cache, config, snapshot=snapshot, policy_version=0, output=tmp_path, run="r"
    )
    report = made.train()
    assert report.drift["0"]["positions"] == report.positions == 3 * first.positions


def test_names_are_enough(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """A folder and a root; the newest scores are pinned while they are replayed, then let go."""
    root = str(cache.storage.root)
    made = ReplayTrainer(str(student_dir), root, CONFIG, output=tmp_path, run="named")
    name = pin_name(tmp_path, "named")
    assert active_pins(cache.storage)[name].snapshots == [cache.snapshot().id]
    assert made.policy_version == -1, "the cache has no policy"
    report = made.train()
    assert report.steps == 6
    assert report.drift["0"]["lag"] is None
    assert name not in active_pins(cache.storage)


def test_the_output_is_named_after_the_run(
    cache: Cache, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ReplayTrainer(student_dir, cache, CONFIG, snapshot=cache.snapshot(), run="mine")
    assert made.output == tmp_path / "runs" / "mine"


def test_the_policy_is_looked_up(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "root")
    register_initial(cache.storage, inspect_model(str(student_dir)), "init")
    assert ReplayTrainer(student_dir, cache, CONFIG, output=tmp_path).policy_version == 0


def test_cross_entropy_on_no_row_is_refused(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    """All text is the student's; a share of 1 would leave the weights as they are."""
    with pytest.raises(MismatchError, match="no such row"):
        trainer(cache, student_dir, tmp_path, replace(CONFIG, cross_entropy=1.0))


def test_another_temperature_is_refused(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    assert cache.identity.temperature == 1
    trainer(cache, student_dir, tmp_path, replace(CONFIG, temperature=1.0))
    with pytest.raises(MismatchError, match=r"train\.temperature.*re-tempered"):
        trainer(cache, student_dir, tmp_path, replace(CONFIG, temperature=2.0))


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"max_steps": 3}, [6, 6, 6]),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, [12, 12]),
        ({"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}, [12, 6]),
        ({"num_train_epochs": 0.1}, [6]),
    ],
    ids=str,
)
def test_steps_and_what_they_take(
    cache: Cache, student_dir: Path, tmp_path: Path, changes: dict[str, Any], rows: list[int]
) -> None:
    """Two batches an epoch; the last step takes what is left of the epochs."""
    made = trainer(cache, student_dir, tmp_path, replace(CONFIG, **changes))
    report = made.train()
    assert made.total_steps == report.steps == len(report.losses) == len(rows)
    assert report.rows == sum(rows)


def test_accumulated_batches_are_as_one(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    halves = replace(CONFIG, gradient_accumulation_steps=2, optimizer="SGD")
    one = replace(halves, gradient_accumulation_steps=1, replay=replace(REPLAY, batch_rows=12))
    reports = [trainer(cache, student_dir, tmp_path, c).train() for c in (halves, one)]
    assert reports[0].losses == pytest.approx(reports[1].losses, abs=1e-5)


def test_only_adapters_are_trained(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """The optimiser keeps no state of frozen weights, and those stay."""
    config = replace(CONFIG, lora=LoraSettings(r=4), learning_rate=3e-2, num_train_epochs=6)
    made = trainer(cache, student_dir, tmp_path, config)
    named = dict(made.student.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    report = made.train()
    assert report.losses[-1] < 0.9 * report.losses[0]
    for name, parameter in named.items():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
        assert (parameter in made.optimizer.state) == ("lora_" in name)


def test_recomputed_activations_change_nothing(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    runs = [
        trainer(cache, student_dir, tmp_path / f"{on}", replace(CONFIG, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert [made.student.model.is_gradient_checkpointing for made in runs] == [False, True]
    found = [gradient(made, 2) for made in runs]
    assert found[1][0] == found[0][0]
    assert torch.equal(found[1][1], found[0][1])


def test_bfloat16_products_train_float32_weights(
    cache: Cache, student_dir: Path, tmp_path: Path
) -> None:
    made = trainer(cache, student_dir, tmp_path, replace(CONFIG, bf16=True, num_train_epochs=8))
    report = made.train()
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert {p.dtype for p in made.student.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it compiles
def test_compiled_layers_give_the_same(cache: Cache, student_dir: Path, tmp_path: Path) -> None:
    """Compiled once for micro-batches of all sizes."""
    torch.compiler.reset()
    losses = []
    for compiled in (False, True):
        config = replace(CONFIG, torch_compile=compiled, gradient_checkpointing=compiled)
        losses.append(trainer(cache, student_dir, tmp_path / f"{compiled}", config).train().losses)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < counted < 12, "four or five of each layer's halves, not some for each size"
