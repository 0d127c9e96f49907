"""transformers' Trainer on a cache: its loop, checkpoints and logs, with replayed steps as data.

    python examples/trainers/hf_trainer.py STUDENT CACHE OUTPUT [--steps 100] [--workers 2]

Started again, it goes on from the newest checkpoint in OUTPUT.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader
from transformers import (
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.dataset import ReplayDataset, StoredSource
from stillroom.replay.policies import check_student
from stillroom.replay.tensors import MicroTensors, Step, from_tensors
from stillroom.train.durable import write_file
from stillroom.train.model_folder import write_model
from stillroom.train.objective import Objective
from stillroom.train.parallel import same_on_all_ranks
from stillroom.train.replay_loss import ReplayLoss, StepCount
from stillroom.train.run_snapshot import keep_snapshot, release_snapshot, snapshot_for
from stillroom.train.student import load_student

RUN = "hf-trainer"
REPLAY = StreamConfig(batch_rows=8, max_tokens=4096)


class ReplayTrainer(Trainer):
    """Trainer whose inputs are whole steps of packed micro-batches."""

    def __init__(self, loss: ReplayLoss, **settings: Any) -> None:
        """Train the loss's student, whose model gives the loss from now on, wrapped or not."""
        loss.student.model.forward = loss
        super().__init__(loss.student.model, **settings)

    def get_train_dataloader(self) -> DataLoader[Step]:
        """A plain loader: the stream itself gives each rank its share."""
        workers = self.args.dataloader_num_workers
        settings: dict[str, Any] = {"multiprocessing_context": "spawn"} if workers else {}
        settings |= {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        return DataLoader(cast(ReplayDataset, self.train_dataset), batch_size=None, **settings)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], int]:
        """Steps that are accumulated, and the scored tokens of all of them on all ranks."""
        steps = list(islice(epoch_iterator, num_batches))
        return steps, sum(step["num_positions"] for step in steps)

    def training_step(self, model: Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backward of one micro-batch after the other; returns this step's part of the loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for tensors in inputs["micro_batches"]:
            loss = self.compute_loss(model, tensors, num_items_in_batch=num_items_in_batch)
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: Module, inputs: MicroTensors | None, *_: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """A micro-batch's part of the mean loss, nats; 0 for one that only keeps step."""
        batch = None if inputs is None else from_tensors(inputs)
        return cast(Tensor, model(batch, StepCount(int(num_items_in_batch))).total)


class KeepPinned(TrainerCallback):
    """Renews the run's pin with every checkpoint."""

    def __init__(self, cache: Cache, output: Path, snapshot: str) -> None:
        """Bind to what is pinned."""
        self._storage, self._output, self._snapshot = cache.storage, output, snapshot

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Renew it, by one rank."""
        if state.is_world_process_zero:
            keep_snapshot(self._storage, self._output, RUN, self._snapshot)


def choose_snapshot(cache: Cache, output: Path) -> str:
    """Id of the snapshot that this output's run began with, pinned; the first start chooses it."""
    chosen = output / "snapshot.txt"
    begun = chosen.read_text() if chosen.exists() else None
    snapshot = snapshot_for(cache, output, RUN, begun).id
    write_file(chosen, snapshot.encode())
    return snapshot


def main(student: str, cache: str, output: Path, **settings: Any) -> None:
    """Train from the newest checkpoint on; settings are those of TrainingArguments."""
    opened, files = Cache.open(cache), inspect_model(student)
    identity = opened.identity
    check_student(files, identity.tokenizer_fingerprint, identity.vocab_size, cache)
    args = TrainingArguments(str(output), ignore_data_skip=True, report_to="none", **settings)
    if args.n_gpu > 1:  # without a launcher, Trainer would cut packed rows up among them
        args._n_gpu = 1
    device = "cpu" if args.use_cpu else "auto"
    snapshot = same_on_all_ranks(lambda: choose_snapshot(opened, output), device)
    source = StoredSource(root=cache, snapshot=snapshot)
    loaded = load_student(files, "float32", args.device)
    rank, world = args.process_index, args.world_size
    dataset = ReplayDataset(source, REPLAY, rank=rank, world=world, one_row=not loaded.packs)
    checkpoint = get_last_checkpoint(str(output))
    if checkpoint:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        dataset.skip(state.global_step * args.gradient_accumulation_steps)
    keep = KeepPinned(opened, output, snapshot)
    # Checkpoints need none, and generation settings that contradict one another cannot be saved.
    generation, loaded.model.generation_config = loaded.model.generation_config, GenerationConfig()
    loss = ReplayLoss(loaded, identity, Objective(kind="forward"))
    trainer = ReplayTrainer(loss, args=args, train_dataset=dataset, callbacks=[keep])
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        loaded.model.generation_config = generation
        write_model(loaded.model, loaded.model.state_dict(), files, output / "student")
        release_snapshot(opened.storage, output, RUN)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("student", help="folder of a Hugging Face model")
    parser.add_argument("cache", help="folder or address of a cache")
    parser.add_argument("output", type=Path, help="folder for checkpoints and the student")
    parser.add_argument("--steps", dest="max_steps", type=int, default=100)
    parser.add_argument("--workers", dest="dataloader_num_workers", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--use-cpu", action="store_true", help="needed by ranks without GPUs")
    main(**vars(parser.parse_args()), logging_steps=1)
