"""What a model folder and a tokenizer are, told from their files, without loading the model.

A model's fingerprint hashes its config, the names, dtypes and shapes of its tensors, and bytes
sampled from each tensor. A tokenizer's fingerprint hashes its map from token to id: equal
fingerprints mean that ids mean the same.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import InputError, MissingError, first_line
from stillroom.cache.storage import local_path

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes of models end that have a head and may be causal."""
VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A complete Hugging Face model folder."""

    folder: Path
    config: dict[str, Any]
    fingerprint: str
    weight_format: str
    """Most common tensor dtype (F32, BF16, ...) or the quantisation method."""
    tokenizer_fingerprint: str
    vocab_size: int
    """Ids that the tokenizer knows: its largest id + 1."""
    logit_width: int
    """Rows of the output head; larger than vocab_size where the head is padded."""
    max_length: int
    """Positions that the model was made for, in tokens."""
    members: tuple["ModelFiles", ...] = ()
    """Further models, where this is the first one of an ensemble."""


def resolve(model: str, revision: str | None = None) -> Path:
    """Folder of a model: a path as it is, or a hub id from the local hub cache (fetched if the hub
    is reachable).

    Raises:
        MissingError: there is no such folder and no such model.
    """
    path = local_path(model)
    if path.is_dir():
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise MissingError(
            model, "a model folder", "nothing", "Check the path, or make the folder first."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        cause = first_line(error)
        do = "Check the name; without network, download it first or give a folder."
        raise MissingError(model, "a model folder or a hub id", cause, do) from error


def inspect_model(model: str, revision: str | None = None) -> ModelFiles:
    """Read what a model folder holds and check that it is whole.

    Raises:
        MissingError: no such folder, or a file of it is missing.
        InputError: a weight file is cut short, a file cannot be parsed, or the model is no causal
            language model.
    """
    folder = resolve(model, revision)
    config = _read_json(folder / "config.json")
    _check_causal(config, folder)
    tensors = tensors_of(folder)
    text_config = config.get("text_config") or config
    width = text_config.get("vocab_size")
    if not isinstance(width, int):
        where = f"{folder / 'config.json'}, vocab_size"
        raise InputError(where, "a number", repr(width), "Save the model again.")
    vocab = _vocab(folder)
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    common = Counter(t["dtype"] for _, t in tensors.values()).most_common(1)[0][0]
    return ModelFiles(
        folder=folder,
        config=config,
        fingerprint=_fingerprint(folder, config, tensors),
        weight_format=quantized or common,
        tokenizer_fingerprint=vocab_fingerprint(vocab),
        vocab_size=max(vocab.values()) + 1,
        logit_width=width,
        max_length=int(text_config.get("max_position_embeddings") or 1 << 30),
    )


def vocab_fingerprint(vocab: dict[str, int]) -> str:
    """Hash of a tokenizer's map from token to id, special tokens included."""
    return jsonfile.digest(jsonfile.dump(sorted(vocab.items(), key=lambda item: item[1])))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(
            str(path),
            "a file of a model folder",
            "nothing",
            "The folder is not complete: save it again.",
        )
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(
            str(path),
            "JSON",
            str(error),
            "The file is damaged or half written: save the model again.",
        ) from error
    if not isinstance(value, dict):
        raise InputError(str(path), "a JSON object", type(value).__name__, "Save the model again.")
    return value


def tensors_of(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every tensor of a model by name: its file, and dtype, shape and first and last byte there.

    Raises:
        MissingError: a weight file is missing.
        InputError: one is cut short, or lacks a tensor that the index names.
    """
    index = folder / "model.safetensors.index.json"
    named = _weight_map(index) if index.is_file() else {}
    tensors: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name in sorted(set(named.values())) or ["model.safetensors"]:
        path = folder / name
        if not path.is_file():
            do = "The folder is not complete: download or save the model again."
            raise MissingError(str(path), "a weight file", "nothing", do)
        for tensor, entry in _safetensors_header(path).items():
            tensors[tensor] = (path, entry)
    absent = sorted(named.keys() - tensors.keys())
    if absent:
        got = f"none of {len(absent)} tensors that the index names, such as {absent[0]}"
        do = "The folder is not complete: download or save the model again."
        raise InputError(str(folder), "every tensor of the index", got, do)
    if not tensors:
        raise InputError(
            str(folder), "weights in safetensors", "no tensor", "Save the model again."
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        expected, got = "a file's name for each tensor", repr(named)[:80]
        raise InputError(f"{index}, weight_map", expected, got, "Save the model again.")
    return named


def _check_causal(config: dict[str, Any], folder: Path) -> None:
    """Refuse what predicts no next token: encoders, encoder-decoders, models without a head. What
    is not told here is found when the model is loaded."""
    classes = config.get("architectures") or []
    is_causal = any(str(name).endswith(CAUSAL) for name in classes) or not classes
    if not is_causal or config.get("is_encoder_decoder"):
        kind = "an encoder and a decoder" if is_causal else ", ".join(map(str, classes))
        where = str(folder / "config.json")
        do = "Choose a model that predicts the next token."
        raise InputError(where, "a causal language model", kind, do)


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size, MAX_HEADER_BYTES):
            raise _cut_short(path, size)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(entry, 8 + length) for name, entry in header.items()}
            end = max((e["data_offsets"][1] for e in entries.values()), default=8 + length)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _cut_short(path, size) from error
    if end != size:
        raise _cut_short(path, size)
    return entries


def _entry(entry: dict[str, Any], base: int) -> dict[str, Any]:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError("offsets out of order")
    offsets = [base + begin, base + end]
    return {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": offsets}


def _cut_short(path: Path, size: int) -> InputError:
    return InputError(
        str(path),
        "a whole safetensors file",
        f"one that is damaged or half written ({size} bytes)",
        "Save the model again.",
    )


def _fingerprint(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[Path, dict[str, Any]]]
) -> str:
    stable = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG}
    parts = [jsonfile.dump(stable)]
    for name, (path, entry) in sorted(tensors.items()):
        parts.append(jsonfile.dump([name, entry["dtype"], entry["shape"]]))
        begin, end = entry["data_offsets"]
        with path.open("rb") as file:
            for start in sorted({begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)}):
                file.seek(start)
                parts.append(jsonfile.digest(file.read(min(SAMPLE_BYTES, end - start))).encode())
    return jsonfile.digest(b"\n".join(parts))


def _vocab(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return dict(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True))
        except Exception as error:
            raise InputError(
                str(path), "a tokenizer", str(error), "Save the tokenizer again."
            ) from error
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(folder).get_vocab())
    except Exception as error:
        cause = first_line(error)
        raise MissingError(
            str(folder), "a tokenizer", cause, "Save the tokenizer beside the model."
        ) from error
