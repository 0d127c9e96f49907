"""Read a cache without Stillroom, from docs/format.md alone: `python read_cache.py CACHE PART`.
No byte is decoded before its hash is verified."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pcodec import standalone
from xxhash import xxh3_128_hexdigest

FINISH_REASONS = ["unknown", "stop", "length", "abort"]
SOURCES = ["unknown", "student", "teacher", "dataset", "import"]


def checked(data: bytes, digest: str) -> bytes:
    if xxh3_128_hexdigest(data) != digest:
        raise ValueError(f"damaged: the hash of {len(data)} bytes is not {digest}")
    return data


def read_sealed(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(checked(data[:-47], data[-34:-2].decode()) + b"}")


def read_part(root: Path, part: str) -> dict[str, np.ndarray]:
    n = 0
    while (root / f"quarantine/{part}.{n}.json").exists():
        n += 1
    commit = read_sealed(root / f"commits/{part.split('-')[0]}/{part}.{n}.json")
    identity = json.loads(checked((root / "cache.json").read_bytes(), commit["identity"]))
    folder = root / f"scores/{part}/{commit['attempt']}"
    manifest = json.loads(checked((folder / "manifest.json").read_bytes(), commit["manifest_hash"]))
    read, name = {"zarr": (read_zarr, "shard.zarr.zip"), "parquet": (read_parquet, "shard.parquet")}[
        identity["shard_format"]
    ]
    out = read(checked((folder / name).read_bytes(), manifest["hash"]), manifest)
    used = np.arange(identity["topk"]) < out["topk_count"][:, None]
    for name, unused in (("topk_id", 2**32 - 1), ("topk_logprob", -np.inf)):
        entries = np.full(used.shape, unused, out[name].dtype)
        entries[used] = out[name]
        out[name] = entries
    return out


def read_zarr(data: bytes, manifest: Any) -> dict[str, np.ndarray]:
    out = {}
    for name, entry in manifest["arrays"].items():
        array = np.empty((len(entry["chunks"]), 2048, *entry["shape"][1:]), entry["dtype"])
        for chunk, (start, length, digest) in zip(array, entry["chunks"], strict=True):
            encoded = checked(data[start : start + length], digest)
            done = standalone.simple_decompress_into(encoded, chunk.reshape(-1))
            if done.n_processed != chunk.size or not done.finished:
                raise ValueError(f"damaged: another count of numbers in {name}")
        out[name] = array.reshape(-1, *entry["shape"][1:])[: entry["shape"][0]]
    groups, width = (manifest["attributes"][key] for key in ("id_groups", "id_group_width"))
    count, ids = out["topk_count"], out.pop("topk_list")
    group = np.repeat(out.pop("topk_group").astype(int), count)
    code = out.pop("topk_code").reshape(-1)[: count.sum()].astype(int)
    out["topk_id"] = ids[np.where(code < width, group, groups - 1) * width + code]
    out["topk_logprob"] = out["topk_logprob"].reshape(-1)[: count.sum()]
    return out


def read_parquet(data: bytes, manifest: Any) -> dict[str, np.ndarray]:
    table, out = pq.ParquetFile(pa.BufferReader(data)).read(), {}
    for name, entry in manifest["arrays"].items():
        values = table[name]
        ...
