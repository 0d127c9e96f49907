"""Training follows the teacher's scores, and not just any scores: two controls must fail.

A tiny teacher is trained on the licence text, and its student lacks half of the layers. With the
teacher's rows as they were cached both held-out figures fall; with the same rows shuffled between
positions, or shifted by one, they do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stillroom.train.replay_loss
from stillroom.replay.batch import MicroBatch
from stillroom.train.pipeline import Pipeline
from stillroom.train.run_config import RunConfig
from stillroom.train.settings import build_settings
from stillroom.train.student import to_target
from stillroom.train.target import TeacherTarget

STEPS, TEXT_TOKENS, KEPT_LAYERS = 200, 64, (0, 3)
Order = Callable[[int], torch.Tensor]
ORDERS: dict[str, Order] = {
    "cached": torch.arange,
    "shuffled": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(n)),
    "shifted": lambda n: torch.arange(n).roll(1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """Folder with a teacher that knows a text, a student of half its layers, and prompts."""
    folder = tmp_path_factory.mktemp("controls")
    text = " ".join((Path(__file__).parents[2] / "LICENSE").read_text().split())
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = trained(torch.tensor(tokenizer(text)["input_ids"]), len(tokenizer))
    student_layers = [teacher.model.layers[i] for i in KEPT_LAYERS]
    for name in ("teacher", "student"):
        if name == "student":
            teacher.model.layers = torch.nn.ModuleList(student_layers)
            teacher.config.num_hidden_layers = len(student_layers)
        teacher.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [text[i : i + 20] for i in range(0, len(text) - 40, 90)]
    for name, chosen in (("prompts", prompts[:64]), ("held_out", prompts[70:86])):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def trained(ids: torch.Tensor, vocab_size: int) -> LlamaForCausalLM:
    """A Llama of four small layers that has read the text for a few seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab_size - 4,
        pad_token_id=vocab_size - 4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - TEXT_TOKENS, (16,))
        batch = torch.stack([ids[s : s + TEXT_TOKENS] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def moved(order: Order) -> Callable[..., TeacherTarget]:
    """Targets whose teacher rows belong to other positions; the sampled token's score follows."""

    def target(batch: MicroBatch, device: torch.device, *, extras: bool) -> TeacherTarget:
        kept = to_target(batch, device, extras=extras)
        at = order(len(kept))
        ids, logprob, tail = kept.topk_id[at], kept.topk_logprob[at], kept.tail_logprob[at]
        hit = ids == kept.sampled_id[:, None]
        inside = torch.where(hit, logprob, 0.0).sum(1)
        return replace(
            kept,
            topk_id=ids,
            topk_logprob=logprob,
            tail_logprob=tail,
            sampled_logprob=torch.where(hit.any(1), inside, tail - 5.0),
        )

    return target


def held_out_change(models: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """First and last held-out forward KL by source of the text, after one round."""
    settings = {
        "root": str(folder / "root"),
        "output": str(folder / "out"),
        "student": str(models / "student"),
        "teacher": {"model": str(models / "teacher"), "device": "cpu"},
        "prompts": {"source": str(models / "prompts.jsonl")},
        "held_out": {"source": str(models / "held_out.jsonl")},
        "rounds": 1,
        "topk": 32,
        "sampler": {"max_new_tokens": 32, "device": "cpu", "batch_rows": 64},
        "refresh": {"prompts_per_cycle": 64},
        "train": {
            "num_train_epochs": 8,
            "learning_rate": 2e-3,
            "device": "cpu",
            "replay": {"batch_rows": 16, "max_tokens": 1024, "block_rows": 2, "window_rows": 8},
        },
    }
    summary = Pipeline(build_settings(RunConfig, settings, "settings")).run()
    changes = {source: summary.change(source) for source in ("student", "teacher")}
    return {source: (c["first_nats"], c["last_nats"]) for source, c in changes.items()}


def test_only_the_cached_rows_teach(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both figures fall by 30 % with the cached rows, and stay far above that with the controls."""
    last: dict[str, dict[str, float]] = {}
    for name, order in ORDERS.items():
        monkeypatch.setattr(stillroom.train.replay_loss, "to_target", moved(order))
        change = held_out_change(models, tmp_path / name)
        last[name] = {source: after for source, (_, after) in change.items()}
        if name == "cached":
            assert all(after < 0.7 * before for before, after in change.values()), change
    for control in ("shuffled", "shifted"):
        for source in ("student", "teacher"):
            assert last[control][source] > 2 * last["cached"][source], last
