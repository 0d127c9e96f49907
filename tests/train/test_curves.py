"""Curves come back from their event files, each step once, whatever ended the run before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from stillroom.cache.errors import StorageError
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.config import ReplayConfig
from stillroom.train.curves import Curves
from stillroom.train.trainer import ReplayTrainer
from tests.train.event_files import points


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard sorts files of one second and process by a number without leading zeros."""
    counter = type(event_file_writer._global_uid)(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def test_points_of_steps_that_are_taken_anew_are_gone(tmp_path: Path) -> None:
    """After the third of five steps, and then from the beginning."""
    for begin, end in ((0, 5), (3, 6), (0, 2)):
        curves = Curves(tmp_path, writes=True)
        curves.open(begin)
        for step in range(begin + 1, end + 1):
            curves.add({"a": step + end / 10, "b/c": -step}, step)
        curves.close()
        if end == 6:
            expected = {1: 1.5, 2: 2.5, 3: 3.5, 4: 4.6, 5: 5.6, 6: 6.6}
            assert points(tmp_path)["a"] == pytest.approx(expected)
    found = points(tmp_path)
    assert found["a"] == pytest.approx({1: 1.2, 2: 2.2})
    assert found["b/c"] == {1: -1, 2: -2}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/run: expected to write curves"):
        Curves(tmp_path / "file" / "run", writes=True).open(0)


def test_a_disk_that_is_full_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = Curves(tmp_path, writes=True)
    curves.open(0)
    writer, close = curves._writer, curves._writer.close

    def fail() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "flush", fail)
    with pytest.raises(StorageError, match="No space left"):
        curves.add({"a": 1.0}, 1)
    monkeypatch.setattr(writer, "close", fail)
    curves.close()
    close()


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    curves = Curves(tmp_path, writes=False)
    curves.open(0)
    curves.add({"a": 1.0}, 1)
    curves.close()
    assert list(tmp_path.iterdir()) == []


class DiesAt(Callback):
    """Is interrupted in a step, after its record was logged."""

    def __init__(self, step: int) -> None:
        """Which."""
        self._step = step

    def on_step(self, trainer: ReplayTrainer, outcome: StepOutcome) -> None:
        """Die in it."""
        if outcome.step == self._step:
            trainer._write_record()
            raise KeyboardInterrupt


def test_a_run_leaves_its_curves(
    make_cache: Callable[..., Cache], student_dir: Path, tmp_path: Path
) -> None:
    """Losses, drift, pace and held-out figures; those of a run that was interrupted and resumed are
    those of an unbroken one."""
    cache, held = make_cache(tmp_path / "root"), make_cache(tmp_path / "held", rows=3, seed=3)
    config = ReplayConfig(
        device="cpu",
        learning_rate=1e-2,
        num_train_epochs=3,
        save_steps=2,
        drift_every_steps=2,
        eval_root=held.storage.root,
        eval_steps=4,
        replay=StreamConfig(batch_rows=6, max_tokens=64, block_rows=2, window_rows=4),
    )
    found = {}
    for name, dies in (("whole", ()), ("resumed", (1, 5))):
        output = tmp_path / name
        for step in dies:
            heard = [DiesAt(step)]
            with pytest.raises(KeyboardInterrupt):
                ReplayTrainer(student_dir, cache, config, output=output, callbacks=heard).train()
        report = ReplayTrainer(student_dir, cache, config, output=output).train()
        found[name] = points(output / "tensorboard" / "replay")
    curves, resumed = found["whole"], found["resumed"]
    assert list(curves["loss_nats"]) == [1, 2, 3, 4, 5, 6]
    assert [curves["loss_nats"][step] for step in (5, 6)] == pytest.approx(report.losses)
    assert curves["drift/k3_nats/v0"][6] == pytest.approx(report.drift["0"]["k3_nats"])
    assert list(curves["drift/k3_nats/v0"]) == [2, 4, 6]
    assert list(curves["held_out/reverse_kl_nats"]) == [4, 6]
    best = report.held_out["best_reverse_kl_nats"]
    assert min(curves["held_out/reverse_kl_nats"].values()) == pytest.approx(best)
    assert all(rate > 0 for rate in curves["pace/tokens_per_s"].values())
    assert resumed.keys() == curves.keys()
    for name in curves:
        assert list(resumed[name]) == list(curves[name]), name
        if not name.startswith("pace/"):
            assert resumed[name] == curves[name], name
