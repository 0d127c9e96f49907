"""What a step is measured on: a student cut out of the quickstart's teacher, its own completions of
HumanEval prompts, all of one length, and a cache of the teacher's scores of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cache.errors import InputError, MissingError

LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 25, 29)
"""Those of the teacher that the student has, as far as they are there."""
MADE_BY = "Make it with examples/quickstart/prepare.py, or name another folder with --models."


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the rows."""

    rows: int = 8
    """Those of a step, and all that there are."""
    prompt: int = 136
    """Tokens; of longer prompts the last ones."""
    completion: int = 64
    """Tokens."""
    topk: int = 64
    """K."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows, and where models and scores lie."""

    root: str
    """The cache."""
    student: str
    teacher: str
    prompts: list[list[int]]
    completions: list[list[int]]


def prepare(models: Path, folder: Path, sizes: Sizes) -> Prepared:
    """Make student, rows and cache; to be called in a process of its own.

    Args:
        models: the folder that the quickstart's `prepare.py` made.
        folder: where the student and the cache go.
        sizes: of the rows.

    Raises:
        MissingError: a model or the prompts are not there.
        InputError: too few prompts or completions are long enough.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("teacher", "prompts.jsonl", "held_out.jsonl"):
        if not (models / name).exists():
            raise MissingError(str(models / name), "the quickstart's", "nothing", MADE_BY)
    teacher, student = models / "teacher", folder / "student"
    _save_student(teacher, student)
    prompts = _prompts(models, teacher, sizes)
    rows = _sampled(student, prompts, sizes)
    root = folder / "cache"
    _score(root, teacher, rows, sizes.topk)
    completions = [row["completion"] for row in rows]
    return Prepared(
        str(root), str(student), str(teacher), [row["prompt"] for row in rows], completions
    )


def _save_student(teacher: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = [model.model.layers[i] for i in LAYERS if i < len(model.model.layers)]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(target)


def _prompts(models: Path, teacher: Path, sizes: Sizes) -> list[list[int]]:
    """The last tokens of every prompt that is long enough."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    found = []
    for name in ("prompts.jsonl", "held_out.jsonl"):
        for line in (models / name).read_text().splitlines():
            chat = json.loads(line)["messages"]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= sizes.prompt:
                found.append(ids[-sizes.prompt :])
    return found


def _sampled(student: Path, prompts: list[list[int]], sizes: Sizes) -> list[dict[str, Any]]:
    """Rollouts of the student: of those that do not stop early, as many as are wanted."""
    import numpy as np

    from stillroom.cache.fingerprint import inspect_model
    from stillroom.replay.sampler import SamplerConfig
    from stillroom.replay.transformers_sampler import TransformersSampler

    config = SamplerConfig(max_new_tokens=sizes.completion, batch_rows=sizes.rows, device="cpu")
    sampler = TransformersSampler(inspect_model(str(student)), config)

    def drawn() -> Iterator[dict[str, Any]]:
        tokens = [np.asarray(prompt, np.uint32) for prompt in prompts]
        for index, sampled in sampler.sample(tokens, seed=0):
            if len(sampled.completion) == sizes.completion:
                yield {
                    "prompt": prompts[index],
                    "completion": sampled.completion.tolist(),
                    "behaviour_logprob": sampled.behaviour_logprob.tolist(),
                }

    rows = [row for row, _ in zip(drawn(), range(sizes.rows), strict=False)]
    if len(rows) < sizes.rows:
        expected = f"{sizes.rows} completions of {sizes.completion} tokens"
        do = "Ask for fewer or shorter ones."
        raise InputError(str(student), expected, f"{len(rows)}", do)
    return rows


def _score(root: Path, teacher: Path, rows: list[dict[str, Any]], topk: int) -> None:
    from stillroom.cache.fingerprint import inspect_model
    from stillroom.cache.score import score
    from stillroom.cache.store import Cache
    from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
    from stillroom.cache.transformers_teacher import TransformersTeacher

    files, config = inspect_model(str(teacher)), TeacherConfig(model=str(teacher), device="cpu")
    cache = Cache.create(root, identity_of(files, config, ScoreSpec(topk=topk)))
    cache.add_rollouts(rows, policy_version=0, sampler={"temperature": 1.0})
    score(cache, TransformersTeacher(files, config))
