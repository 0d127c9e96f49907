"""Copies of a tiny model that know the same tokens by other ids, and more tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

EMBEDDING = "model.embed_tokens.weight"


def reordered(
    source: Path, target: Path, *, more: Sequence[str] = (), seed: int = 0, padding: int = 0
) -> Path:
    """A copy of a tied model whose ids are shuffled: after the same tokens it computes the same
    logits for them.

    Args:
        source: folder of the model.
        target: folder of the copy.
        more: tokens that only the copy has, with embeddings of their own.
        seed: of the order and those embeddings.
        padding: rows of the output head behind the vocabulary.

    Returns:
        target.
    """
    shutil.copytree(source, target)
    rng = np.random.default_rng(seed)
    tensors = load_file(target / "model.safetensors")
    old = tensors[EMBEDDING]
    raw = json.loads((target / "tokenizer.json").read_text())
    size = len(raw["model"]["vocab"]) + len(raw["added_tokens"])
    new_id = rng.permutation(size + len(more))
    table = rng.normal(0, 0.9, (size + len(more) + padding, old.shape[1])).astype(old.dtype)
    table[new_id[:size]] = old[:size]
    save_file(tensors | {EMBEDDING: table}, target / "model.safetensors", {"format": "pt"})
    vocab = raw["model"]["vocab"] | {t["content"]: t["id"] for t in raw["added_tokens"]}
    vocab |= {token: size + i for i, token in enumerate(more)}
    raw["model"]["vocab"] = {token: int(new_id[i]) for token, i in vocab.items()}
    for token in raw["added_tokens"]:
        token["id"] = int(new_id[token["id"]])
    (target / "tokenizer.json").write_text(json.dumps(raw))
    change_json(target / "config.json", vocab_size=len(table))
    for name in ("config.json", "generation_config.json"):
        known = json.loads((target / name).read_text())
        own = {k: int(new_id[known[k]]) for k in ("eos_token_id", "pad_token_id") if known.get(k)}
        change_json(target / name, **own)
    return target


def change_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
