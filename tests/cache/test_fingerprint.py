"""What a model folder is, told from its files."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stillroom.cache.errors import InputError, MissingError
from stillroom.cache.fingerprint import SAMPLE_BYTES, inspect_model, resolve
from tests.conftest import VOCAB

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(teacher_dir: Path, tmp_path: Path) -> Path:
    """A copy of the teacher's folder that may be damaged."""
    return Path(shutil.copytree(teacher_dir, tmp_path / "model"))


def change_config(model: Path, **changes: Any) -> None:
    """Change entries of config.json; `...` takes one away."""
    path = model / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def shard_weights(model: Path) -> None:
    """Spread the weights over two files with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, half in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, model / file)
        weight_map |= dict.fromkeys(half, file)
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_complete_folder(model: Path) -> None:
    files = inspect_model(str(model))
    assert files.folder == model
    assert files.vocab_size == files.logit_width == VOCAB
    assert files.max_length == 256
    assert files.weight_format == "F32"
    assert files.config["model_type"] == "llama"
    assert len(files.fingerprint) == len(files.tokenizer_fingerprint) == 32
    assert inspect_model(str(model)) == files


def test_a_copy_is_the_same_and_another_model_is_not(
    model: Path, teacher_dir: Path, student_dir: Path
) -> None:
    teacher, student = inspect_model(str(teacher_dir)), inspect_model(str(student_dir))
    assert inspect_model(str(model)).fingerprint == teacher.fingerprint
    assert student.fingerprint != teacher.fingerprint
    assert student.tokenizer_fingerprint == teacher.tokenizer_fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(MissingError, match=str(model / name)):
        inspect_model(str(model))


def test_a_missing_tokenizer_is_named(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    with pytest.raises(MissingError, match=f"{model}: expected a tokenizer"):
        inspect_model(str(model))


def test_a_damaged_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer"):
        inspect_model(str(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"vocab_size": "many"}', "{}"])
def test_a_damaged_config_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        inspect_model(str(model))


@pytest.mark.parametrize("model_name", ["./nothing", "/nothing", "nothing", "a/b/c", "~/nothing/"])
def test_no_folder_is_missing(model_name: str) -> None:
    with pytest.raises(MissingError, match="a model folder"):
        resolve(model_name)


def test_a_hub_id_that_is_not_here_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def fail(name: str, **_: object) -> str:
        raise OSError(f"no network for {name}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MissingError, match=r"a hub id; got no network for org/name\. Check"):
        resolve("org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert resolve("org/name") == tmp_path


def test_weights_cut_short_at_any_byte_are_refused(model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 8, 9, 1000, 3000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"model\.safetensors: expected a whole"):
            inspect_model(str(model))
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match=r"model\.safetensors: expected a whole"):
        inspect_model(str(model))


def test_a_flipped_bit_of_the_header_is_refused_or_gives_another_fingerprint(model: Path) -> None:
    path, before = model / "model.safetensors", inspect_model(str(model)).fingerprint
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start = data.index(b'"', data.index(b"}", 8) + 1)  # past the metadata, which is not hashed
    rng = np.random.default_rng(0)
    for at in [*range(8), *rng.choice(np.arange(start, 8 + length), 100).tolist()]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert inspect_model(str(model)).fingerprint != before or data[at] == ord(" ")
        except InputError:
            continue


def test_headers_of_another_form_are_refused(model: Path) -> None:
    path = model / "model.safetensors"
    for header in (b"[]", b"{}", b'{"a":1}', b'{"a":{"dtype":"F32","shape":[1]}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(InputError):
            inspect_model(str(model))
    path.write_bytes(struct.pack("<Q", 2**62))
    with pytest.raises(InputError):
        inspect_model(str(model))


def test_no_weights_in_safetensors_is_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(MissingError, match=r"model\.safetensors: expected a weight file"):
        inspect_model(str(model))


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def offsets_of(path: Path, tensor: str) -> tuple[int, int]:
    """First and last byte of a tensor in a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    return 8 + length + begin, 8 + length + end - 1


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_of_the_weights_changes_the_fingerprint(
    model: Path, tensor: str, which: int
) -> None:
    before = inspect_model(str(model)).fingerprint
    path = model / "model.safetensors"
    flip(path, offsets_of(path, tensor)[which])
    assert inspect_model(str(model)).fingerprint != before


def test_the_middle_of_a_large_tensor_is_sampled_too(model: Path) -> None:
    path = model / "model.safetensors"
    save_file({"a": np.zeros(20 * SAMPLE_BYTES, np.uint8)}, path)
    first, last = offsets_of(path, "a")
    before = inspect_model(str(model)).fingerprint
    for at in (first, (first + last + 1) // 2, last):
        flip(path, at)
        assert inspect_model(str(model)).fingerprint != before
        flip(path, at)
    assert inspect_model(str(model)).fingerprint == before


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"transformers_version": "99"}, True),
        ({"_name_or_path": "/elsewhere"}, True),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, True),
        ({"use_cache": False}, True),
        ({"rms_norm_eps": 1e-5}, False),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, False),
        ({"model_type": "mistral"}, False),
        ({"rms_norm_eps": ...}, False),
    ],
)
def test_only_what_the_model_computes_with_counts(
    model: Path, changes: dict[str, Any], same: bool
) -> None:
    before = inspect_model(str(model)).fingerprint
    change_config(model, **changes)
    assert (inspect_model(str(model)).fingerprint == before) == same


def test_the_layout_of_the_files_does_not_count(model: Path) -> None:
    before, path = inspect_model(str(model)).fingerprint, model / "model.safetensors"
    tensors = load_file(path)
    for length in (0, 1, 100, 1000, 10_000):
        save_file(tensors, path, metadata={"note": "n" * length})
        assert inspect_model(str(model)).fingerprint == before
    shard_weights(model)
    assert inspect_model(str(model)).fingerprint == before


def test_a_sharded_checkpoint_is_read_through_its_index(model: Path) -> None:
    before = inspect_model(str(model))
    shard_weights(model)
    files = inspect_model(str(model))
    assert files.weight_format == before.weight_format
    flip(model / "model-00002-of-00002.safetensors", -1)
    assert inspect_model(str(model)).fingerprint != files.fingerprint


def test_a_missing_file_of_a_sharded_checkpoint_is_named(model: Path) -> None:
    shard_weights(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="model-00002-of-00002"):
        inspect_model(str(model))


def test_a_tensor_that_only_the_index_names_is_missing(model: Path) -> None:
    """As where the files of two downloads were mixed."""
    shard_weights(model)
    path = model / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"none of 1 tensors .*model\.more\.weight"):
        inspect_model(str(model))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form_is_refused(model: Path, text: str) -> None:
    (model / INDEX).write_text(text)
    with pytest.raises(InputError, match="weight_map: expected a file's name for each tensor"):
        inspect_model(str(model))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "got BertForMaskedLM"),
        ({"architectures": ["LlamaModel"]}, "got LlamaModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "got LlamaForSequence"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "got an encoder and a decoder",
        ),
    ],
)
def test_a_model_that_predicts_no_next_token_is_refused(
    model: Path, changes: dict[str, Any], got: str
) -> None:
    change_config(model, **changes)
    with pytest.raises(InputError, match=rf"config\.json: expected a causal .*; {got}"):
        inspect_model(str(model))


@pytest.mark.parametrize(
    "names", [["GPT2LMHeadModel"], ["Gemma3ForConditionalGeneration"], [], ...]
)
def test_a_model_that_may_predict_the_next_token_is_taken(model: Path, names: Any) -> None:
    change_config(model, architectures=names)
    assert inspect_model(str(model)).vocab_size == VOCAB


def test_names_dtypes_and_shapes_count(model: Path) -> None:
    path, found = model / "model.safetensors", set()
    zeros: list[dict[str, np.ndarray]] = [
        {"a": np.zeros(4, np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros(4, np.float32), "b": np.zeros(0, np.float32)},
    ]
    for tensors in zeros:
        save_file(tensors, path)
        found.add(inspect_model(str(model)).fingerprint)
    assert len(found) == len(zeros)


def test_the_weight_format(model: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "a": np.zeros(4, np.float16),
        "b": np.zeros(4, np.float16),
        "c": np.zeros(4, np.float32),
    }
    save_file(tensors, model / "model.safetensors")
    assert inspect_model(str(model)).weight_format == "F16"
    change_config(model, quantization_config={"quant_method": "fp8"})
    assert inspect_model(str(model)).weight_format == "fp8"
    change_config(model, quantization_config=None)
    assert inspect_model(str(model)).weight_format == "F16"


def test_a_composite_config_is_read_at_its_text_part(model: Path) -> None:
    text = {"vocab_size": 300, "max_position_embeddings": 77}
    change_config(model, vocab_size=1, text_config=text)
    files = inspect_model(str(model))
    assert (files.logit_width, files.max_length, files.vocab_size) == (300, 77, VOCAB)


def test_no_limit_of_length_is_a_large_one(model: Path) -> None:
    change_config(model, max_position_embeddings=...)
    assert inspect_model(str(model)).max_length == 1 << 30


def _rename_token(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["Q2"] = vocab.pop("Q")


def _swap_tokens(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["Q"], vocab["R"] = vocab["R"], vocab["Q"]


def _rename_special(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][0]["content"] = "<|stop|>"


@pytest.mark.parametrize("change", [_rename_token, _swap_tokens, _rename_special])
def test_another_map_of_tokens_is_another_tokenizer(
    model: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    before = inspect_model(str(model))
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))
    after = inspect_model(str(model))
    assert after.tokenizer_fingerprint != before.tokenizer_fingerprint
    assert after.fingerprint == before.fingerprint
