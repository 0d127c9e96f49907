"""A trained model as a folder: plain weights, with the tokenizer and the generation settings of the
model that it was trained from.

Whatever it was trained with, adapters are added to the weights, and shards are put together.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from stillroom.cache.errors import MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.train.lora import has_lora, merged_state

GENERATION = "generation_config.json"
NO_SETTINGS = ("transformers_version", "_from_model_config")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "tekken.json",
)


def write_model(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    parent_files: ModelFiles,
    folder: Path,
) -> ModelFiles:
    """Write a model's weights and config, and copy the other files of its parent as they are.

    Args:
        model: what was trained; its configuration and the layout of its adapters are read.
        state: its whole state, with adapters, by its own names.
        parent_files: the model that it was trained from.
        folder: where to; made if it is not there. Files of the same names are replaced.

    Returns:
        What the folder holds.

    Raises:
        MismatchError: the tokenizer files that were copied are not all that the tokenizer takes, or
            were changed since the parent was inspected.
    """
    weights = merged_state(model, dict(state)) if has_lora(model) else dict(state)
    with torch.device("meta"):  # the trained one may have adapters, or shards of them
        plain = AutoModelForCausalLM.from_config(model.config, dtype=_dtype(weights))
    # of a parent that keeps generation settings in its config.json, where none are saved
    is_lost = _said(model.generation_config) != _said(plain.generation_config)
    # transformers loads settings that contradict one another, and refuses to save them
    plain.generation_config = GenerationConfig()
    tied = plain.all_tied_weights_keys
    hf_logging.disable_progress_bar()
    plain.save_pretrained(
        folder, state_dict={name: w.cpu() for name, w in weights.items() if name not in tied}
    )
    (folder / GENERATION).unlink(missing_ok=True)
    if is_lost:
        model.generation_config.to_json_file(folder / GENERATION)
    for pattern in (GENERATION, *TOKENIZER_FILES):
        for path in parent_files.folder.glob(pattern):
            _copy(path, folder / path.name)
    return _with_tokenizer_of(parent_files, folder)


def _said(generation: GenerationConfig | None) -> dict[str, object]:
    """Its settings, but for those that are off."""
    said = {} if generation is None else generation.to_diff_dict()
    return {name: value for name, value in said.items() if value and name not in NO_SETTINGS}


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)


def _with_tokenizer_of(parent_files: ModelFiles, folder: Path) -> ModelFiles:
    expected = f"files of its tokenizer, {parent_files.tokenizer_fingerprint}, to copy"
    do = "Save that tokenizer into it again with save_pretrained."
    try:
        saved = inspect_model(str(folder))
    except MissingError as error:
        raise MismatchError(str(parent_files.folder), expected, error.got, do) from error
    got = saved.tokenizer_fingerprint
    if got != parent_files.tokenizer_fingerprint:
        raise MismatchError(str(parent_files.folder), expected, got, do)
    return saved


def _dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(weight.dtype for weight in weights.values() if weight.is_floating_point())
