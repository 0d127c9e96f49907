"""Files that are not a cache's: rollouts of strangers, and what a run leaves in its folder."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache import jsonfile
from stillroom.cache.add_rollouts import plan_parts
from stillroom.cache.checked_rollouts import check_rollouts
from stillroom.replay import ReplayStream, Source, StreamConfig
from stillroom.tools.layouts import LAYOUTS, Layout
from stillroom.tools.rollout_files import read_batches
from stillroom.train.stages import StageLog, StageRecord
from tests.fuzz.attempt import attempt
from tests.fuzz.memory import small_cache
from tests.fuzz.mutate import mutate_bytes, mutate_footer, mutate_json
from tests.tools.small_cache import LIVE, rollouts

VERL = {"prompt_ids": [1, 2], "response_ids": [3, 4], "response_mask": [1, 0]}
VERL_BATCH = {
    "prompts": [0, 1],
    "responses": [3, 4, 0],
    "attention_mask": [0, 1, 1, 1, 0],
    "response_mask": [1, 1, 0],
    "rollout_log_probs": [-0.5, -0.25, 0.0],
    "uid": "5e1f",
}
TRL = {"prompt_ids": [1], "completion_ids": [3, 4], "logprobs": [-0.5, -0.25], "env_mask": [1, 1]}
SGLANG = {
    "input_ids": [1, 2],
    "output_ids": [3, 7],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 7},
        "output_token_logprobs": [[-0.5, 3, None], [-1.0, 7, None]],
    },
}
VLLM = {
    "prompt_token_ids": [1, 2],
    "outputs": [
        {
            "token_ids": [3],
            "logprobs": [{"3": {"logprob": -0.5, "rank": 1}}],
            "finish_reason": "length",
            "stop_reason": None,
        }
    ],
}
OWN = {"prompt": [1, 2], "completion": [3, 4], "scored": [0, 1], "x_reward": 0.5, "group": "g"}
TALK = {"token": [1, 2, 3], "scored": [0, 1, 1], "behaviour_logprob": [0.0, -1.0, -0.5]}
RECORDS: tuple[Mapping[str, Any], ...] = (VERL, VERL_BATCH, TRL, SGLANG, VLLM, OWN, TALK)
COLUMNS = {"prompt": "prompt_ids", "completion": "response_ids"}


@cache
def _folder() -> "TemporaryDirectory[str]":
    return TemporaryDirectory(prefix="stillroom-fuzz-")


def _path(name: str) -> Path:
    return Path(_folder().name) / name


def _read_rollouts(name: str, data: bytes) -> None:
    """Import a file in every way."""
    path = _path(name)
    path.write_bytes(data)
    ways: list[tuple[Mapping[str, str] | None, Layout | None]] = [(None, None), (COLUMNS, None)]
    ways += [(None, layout) for layout in LAYOUTS.values()]
    for columns, layout in ways:
        attempt(partial(_import, path, columns, layout))


def _import(path: Path, columns: Mapping[str, str] | None, layout: Layout | None) -> None:
    own = small_cache("zarr")
    batches = read_batches(path, columns, layout)
    checked = check_rollouts(batches, own.identity, str(path), skip_bad=True)
    plan_parts(own, [checked], skip_bad=True)


def _lines() -> list[bytes]:
    each = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    return [*each, each[0] * 3]


def _tables() -> list[bytes]:
    tables = [pa.Table.from_pylist([dict(record)]) for record in (VERL, VERL_BATCH, OWN, TALK)]
    return [_parquet(table) for table in [*tables, rollouts(0)]]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    written: bytes = sink.getvalue().to_pybytes()
    return written


@cache
def _stream() -> ReplayStream:
    own = small_cache("zarr")
    config = StreamConfig(batch_rows=4, max_tokens=64, block_rows=2, window_rows=2)
    return ReplayStream(Source(own, own.snapshot([LIVE])), config)


def _read_state(data: bytes) -> None:
    stream = _stream()
    stream.load_state_dict(jsonfile.load(data, "state"))
    stream.next_batch()


def _read_stage(data: bytes) -> None:
    path = _path("stage.json")
    path.write_bytes(data)
    StageLog(path.parent).finished("stage")


def _stages() -> list[bytes]:
    record = StageRecord(0.5, ((_folder().name, "stage.json"),), {"loss": 1.0})
    return [jsonfile.dump(asdict(record))]


KINDS: dict[str, tuple[Any, ...]] = {
    "rollouts jsonl": (_lines, partial(_read_rollouts, "a.jsonl"), mutate_json),
    "rollouts jsonl.gz": (
        lambda: [gzip.compress(line, mtime=0) for line in _lines()[:2]],
        partial(_read_rollouts, "a.jsonl.gz"),
        mutate_bytes,
    ),
    "rollouts parquet": (_tables, partial(_read_rollouts, "a.parquet"), mutate_footer),
    "stream state": (lambda: [jsonfile.dump(_stream().state_dict())], _read_state, mutate_json),
    "stage": (_stages, _read_stage, mutate_json),
}
