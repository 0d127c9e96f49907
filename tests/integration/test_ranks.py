"""Several ranks (gloo) end with the weights of one, however they share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.store import Cache
from stillroom.train.optimizer import UNSHARDED
from tests.conftest import save_llama

pytestmark = pytest.mark.dist

# 11 rows in batches of 5: the last step of an epoch has one row, so that ranks are idle in it.
BASE: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "optimizer": "SGD",
    "max_grad_norm": 0.5,
    "device": "cpu",
    "drift_every_steps": 3,
    "replay": {"batch_rows": 5, "max_tokens": 40, "block_rows": 2, "window_rows": 4},
}

FLAGS = ("double", "one_row", "compiler", "worse_after", "refused")
"""Of a case, beside its settings."""


class Ranks:
    """Runs cases on numbers of ranks, and compares what came out."""

    def __init__(self, folder: Path, root: str, students: dict[str, Path], held: str = "") -> None:
        """Plan nothing yet."""
        self._folder, self._root, self._held, self._students = folder, root, held, students
        self._plan: dict[int, list[dict[str, Any]]] = {}

    def case(self, worlds: tuple[int, ...], name: str, student: str, **changes: Any) -> None:
        """Plan one; `replay` changes single settings of it, and with `eval_steps` the student is
        measured on the held-out cache."""
        flags = {flag: changes.pop(flag, None) for flag in FLAGS}
        if "eval_steps" in changes:
            changes["eval_root"] = self._held
        replay = BASE["replay"] | changes.pop("replay", {})
        settings = BASE | changes | {"replay": replay}
        made = {"name": name, "student": str(self._students[student]), "settings": settings}
        for world in worlds:
            self._plan.setdefault(world, []).append(made | flags)

    def run(self, timeout: int) -> None:
        """Run all of them, in one launch."""
        plan = {"root": self._root, "output": str(self._folder), "worlds": [*self._plan.items()]}
        path = self._folder / "plan.json"
        path.write_text(json.dumps(plan))
        script = Path(__file__).with_name("ranks.py")
        done = subprocess.run(
            [sys.executable, str(script), str(path)],
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "FutureWarning" not in done.stderr

    def found(self, world: int, name: str) -> dict[str, np.ndarray]:
        """What a case left."""
        with np.load(self._folder / f"{world}-{name}.npz") as arrays:
            return dict(arrays)

    def assert_same(
        self, one: tuple[int, str], other: tuple[int, str], tolerance: float, keys: str = ""
    ) -> None:
        """All arrays are equal up to a part of the largest number in them, or of 1."""
        mine, theirs = self.found(*one), self.found(*other)
        assert mine.keys() == theirs.keys()
        assert len(mine["losses"]) > 1
        for key in (key for key in mine if keys in key):
            size = max(1.0, float(np.abs(mine[key]).max()))
            gap = float(np.abs(mine[key] - theirs[key]).max())
            assert gap <= tolerance * size, f"{one} and {other}: {key} differs by {gap}"


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose output head is its input embedding, and one with two matrices."""
    folder = tmp_path_factory.mktemp("students")
    return {
        "tied": save_llama(folder / "tied", seed=2),
        "untied": save_llama(folder / "untied", seed=2, tied=False),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> str:
    """Eleven scored rollouts, with weights."""
    folder = tmp_path_factory.mktemp("ranks") / "root"
    return str(make_cache(folder, rows=11, weighted=1).storage.root)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Cache]) -> str:
    """Three others."""
    return str(make_cache(tmp_path_factory.mktemp("held") / "root", rows=3, seed=5).storage.root)


@pytest.fixture
def ranks(tmp_path: Path, root: str, held: str, students: dict[str, Path]) -> Ranks:
    """Nothing planned."""
    return Ranks(tmp_path, root, students, held)


def test_two_ranks_equal_one(ranks: Ranks) -> None:
    """Replicated and sharded, to the last digits of float64."""
    ranks.case((1,), "one", "tied", double=True)
    for kind in ("ddp", "fsdp"):
        ranks.case((2,), kind, "tied", parallel=kind, double=True)
    ranks.run(timeout=240)
    for kind in ("ddp", "fsdp"):
        ranks.assert_same((1, "one"), (2, kind), 1e-12)


@pytest.mark.slow
def test_smaller_floats_give_what_they_can(ranks: Ranks) -> None:
    """Float32 its digits; products in bfloat16 the losses, with weights that stay float32."""
    for name, bf16 in (("single", False), ("half", True)):
        ranks.case((1,), name, "untied", bf16=bf16)
        for kind in ("ddp", "fsdp"):
            ranks.case((2,), f"{kind}-{name}", "untied", parallel=kind, bf16=bf16)
    ranks.run(timeout=300)
    for kind in ("ddp", "fsdp"):
        ranks.assert_same((1, "single"), (2, f"{kind}-single"), 1e-6)
        ranks.assert_same((1, "half"), (2, f"{kind}-half"), 0.02, "losses")
        found = ranks.found(2, f"{kind}-half")
        assert {found[key].dtype for key in found if "weights" in key} == {np.dtype(np.float32)}


STUDENT = ["student"]
LORA = {"r": 4, "alpha": 8.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"student": "untied"},
    "lora": {"lora": LORA},
    "lora-head": {"student": "untied", "lora": LORA | {"target_modules": ["q_proj", "lm_head"]}},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulated": {"gradient_accumulation_steps": 2, "replay": {"batch_rows": 3}},
    "mixed": {
        "kind": "jsd",
        "beta": 0.3,
        "cross_entropy": 0.4,
        "cross_entropy_sources": ["student"],
    },
    "adam": {"optimizer": "AdamW", "optimizer_args": {"eps": 1e-2}, "weight_decay": 0.1},
    "weighted": {"kind": "reverse_kl_rb", "replay": {"weight_column": "x_weight"}},
    "best": {"eval_steps": 2, "load_best_model_at_end": True, "worse_after": 4},
}


@pytest.mark.slow
def test_ranks_of_every_kind_equal_one(ranks: Ranks) -> None:
    for name, variant in VARIANTS.items():
        settings: dict[str, Any] = {"student": "tied", "double": True} | variant
        ranks.case((1,), name, **settings)
        for kind in ("ddp", "fsdp"):
            ranks.case((2, 4), f"{kind}-{name}", **settings, parallel=kind)
    ranks.run(timeout=600)
    assert ranks.found(1, "best")["student_step"] in (2, 4), "an earlier one was put back"
    for name in VARIANTS:
        for world in (2, 4):
            for kind in ("ddp", "fsdp"):
                ranks.assert_same((1, name), (world, f"{kind}-{name}"), 1e-12)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Muon": {},
}


@pytest.mark.slow
def test_sharded_weights_take_every_optimiser_that_is_not_refused(ranks: Ranks) -> None:
    """Their steps on shards are those on whole weights; Muon's are of adapters."""
    for name, args in OPTIMIZERS.items():
        settings: dict[str, Any] = {"optimizer": name, "optimizer_args": args, "double": True}
        settings |= {"learning_rate": 1e-3, "lora": LORA if name == "Muon" else None}
        ranks.case((1,), name, "tied", **settings)
        refused = f"got {name!r}" if name in UNSHARDED else None
        ranks.case((2,), f"fsdp-{name}", "tied", parallel="fsdp", refused=refused, **settings)
    ranks.run(timeout=300)
    for name in [name for name in OPTIMIZERS if name not in UNSHARDED]:
        tolerance = 1e-3 if name == "Muon" else 1e-12  # Muon multiplies in bfloat16
        ranks.assert_same((1, name), (2, f"fsdp-{name}"), tolerance)


@pytest.mark.slow
def test_compiled_layers_on_two_ranks(ranks: Ranks) -> None:
    """Traced and differentiated ahead of time, as torch_compile does, without its compiler."""
    ranks.case((1,), "plain", "tied", double=True)
    for kind in ("ddp", "fsdp"):
        ranks.case((2,), kind, "tied", parallel=kind, double=True, compiler="aot_eager")
    ranks.run(timeout=300)
    for kind in ("ddp", "fsdp"):
        ranks.assert_same((1, "plain"), (2, kind), 1e-12)


@pytest.mark.slow
def test_the_denominator_is_that_of_the_whole_step(ranks: Ranks) -> None:
    """1 x 8, 8 x 1 and 2 x 4 processes and micro-batches, packed or one row each."""
    step = {"max_steps": 2, "num_train_epochs": 1, "double": True}
    whole = {"batch_rows": 8, "max_tokens": 4096, "last_batch": "carry"}
    ranks.case((1, 2, 8), "packed", "tied", **step, replay=whole)
    ranks.case((1, 2, 8), "rows", "tied", **step, replay=whole, one_row=True)
    halves = {"gradient_accumulation_steps": 2, "replay": whole | {"batch_rows": 4}}
    ranks.case((1, 2), "halves", "tied", **step, **halves)
    ranks.run(timeout=600)
    others = [(world, name) for world in (1, 2, 8) for name in ("packed", "rows")]
    for other in [*others[1:], (1, "halves"), (2, "halves")]:
        ranks.assert_same((1, "packed"), other, 1e-12)
