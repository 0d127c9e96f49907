"""A PyTorch loop of your own that replays a cache: stored scores in, a trained student out.

    python examples/trainers/bare_loop.py STUDENT CACHE OUTPUT [--steps 100]

Every few steps it writes OUTPUT/checkpoint.pt: the student, the optimiser, and where the stream
stands. Started again, it goes on from there, with the same losses as if it had never stopped.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stillroom.cache.causal_lm import pick_device
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.dataset import ReplayDataset, StoredSource
from stillroom.replay.policies import check_student
from stillroom.train.model_folder import write_model
from stillroom.train.objective import Objective
from stillroom.train.parallel import Parallel
from stillroom.train.replay_loss import ReplayLoss
from stillroom.train.run_snapshot import keep_snapshot, release_snapshot, snapshot_for
from stillroom.train.step import backward, batch_of
from stillroom.train.student import load_student

RUN = "bare-loop"
REPLAY = StreamConfig(batch_rows=8, max_tokens=4096)


def train(
    student: str, cache: str, output: Path, steps: int, save_every: int, learning_rate: float
) -> Iterator[float]:
    """Yields the loss of each step, nats a scored token."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.pt"
    saved = torch.load(checkpoint) if checkpoint.exists() else None
    opened, files = Cache.open(cache), inspect_model(student)
    identity = opened.identity
    check_student(files, identity.tokenizer_fingerprint, identity.vocab_size, cache)
    snapshot = snapshot_for(opened, output, RUN, saved["snapshot"] if saved else None).id

    device = pick_device("auto")
    model = load_student(files, "float32", device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    source = StoredSource(root=cache, snapshot=snapshot)
    one_row, pin = not model.packs, device.type == "cuda"
    dataset = ReplayDataset(source, REPLAY, num_steps=steps, one_row=one_row, pin=pin)
    if saved:
        model.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        dataset.load_state_dict(saved["dataset"])

    loss = ReplayLoss(model, identity, Objective(kind="forward"))
    parallel = Parallel(model.model)
    for step in dataset:
        found = backward(parallel, loss, [batch_of(step)])
        optimizer.step()
        optimizer.zero_grad()
        state = dataset.state_dict()
        if state["step"] % save_every == 0 or state["step"] == steps:
            parts = {"student": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**parts, "dataset": state, "snapshot": snapshot})
            keep_snapshot(opened.storage, output, RUN, snapshot)
        yield found.loss
    write_model(model.model, model.model.state_dict(), files, output / "student")
    release_snapshot(opened.storage, output, RUN)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Put a file in place at once: whoever dies, a whole checkpoint is there."""
    half = path.with_suffix(".tmp")
    with half.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("student", help="folder of a Hugging Face model")
    parser.add_argument("cache", help="folder or address of a cache")
    parser.add_argument("output", type=Path, help="folder for the checkpoint and the student")
    parser.add_argument("--steps", type=int, default=100, help="steps of the whole run")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of AdamW")
    for loss in train(**vars(parser.parse_args())):
        print(f"{loss:.6f} nats", flush=True)
