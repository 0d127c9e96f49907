"""A cache read from docs/format.md alone: `python read_cache.py CACHE PART`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from pcodec import standalone
from xxhash import xxh3_128_hexdigest

FINISH_REASONS = ("unknown", "stop", "length", "abort")
SOURCES = ("unknown", "student", "teacher", "dataset", "import")
NAMES = {"finish_reason": FINISH_REASONS, "source": SOURCES}
EDGES = {"token": "sequence", "tail_logprob": "position", "teacher_prompt": "teacher_prompt"}


def checked(data: bytes, digest: str) -> bytes:
    if xxh3_128_hexdigest(data) != digest:
        raise ValueError(f"damaged: the hash of {len(data)} bytes is not {digest}")
    return data


def read_part(root: Path, part: str) -> dict[str, np.ndarray]:
    n = next(n for n in range(10**9) if not (root / f"quarantine/{part}.{n}.json").exists())
    data = (root / f"commits/{part.split('-')[0]}/{part}.{n}.json").read_bytes()
    commit = json.loads(checked(data[:-47], data[-34:-2].decode()) + b"}")
    folder = root / f"scores/{part}/{commit['attempt']}"
    manifest = json.loads(checked((folder / "manifest.json").read_bytes(), commit["manifest_hash"]))
    is_zarr = "topk_code" in manifest["arrays"]
    data = (folder / ("shard.zarr.zip" if is_zarr else "shard.parquet")).read_bytes()
    out = (read_zarr if is_zarr else read_parquet)(checked(data, manifest["hash"]), manifest)
    used = np.arange(manifest["arrays"]["topk_logprob"]["shape"][1]) < out["topk_count"][:, None]
    for name, unused in (("topk_id", 2**32 - 1), ("topk_logprob", -np.inf)):
        entries, out[name] = out[name].ravel(), np.full(used.shape, unused, out[name].dtype)
        out[name][used] = entries[: used.sum()]
    return out


def read_zarr(data: bytes, manifest: Any) -> dict[str, np.ndarray]:
    out = {}
    for name, entry in manifest["arrays"].items():
        array = np.empty((len(entry["chunks"]), 2048, *entry["shape"][1:]), entry["dtype"])
        for chunk, (start, length, digest) in zip(array, entry["chunks"], strict=True):
            encoded = checked(data[start : start + length], digest)
            done = standalone.simple_decompress_into(encoded, chunk.reshape(-1))
            if (done.n_processed, done.finished) != (chunk.size, True):
                raise ValueError(f"damaged: other than {chunk.size} numbers in {name}")
        out[name] = array.reshape(-1, *entry["shape"][1:])[: entry["shape"][0]]
    groups, width = (manifest["attributes"][key] for key in ("id_groups", "id_group_width"))
    group = np.repeat(out.pop("topk_group").astype(int), out["topk_count"])
    code = out.pop("topk_code").ravel()[: len(group)].astype(int)
    index = np.where(code < width, group, groups - 1) * width + code
    return out | {"topk_id": out.pop("topk_list")[index]}


def read_parquet(data: bytes, manifest: Any) -> dict[str, np.ndarray]:
    table, out = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read(), {}
    for name, entry in manifest["arrays"].items():
        values, lists = table[name].combine_chunks(), list[np.ndarray]()
        while pyarrow.types.is_list(values.type):
            lists, values = [*lists, values.value_lengths().to_numpy()], values.flatten()
        numbers = [NAMES[name].index(v) for v in values.to_pylist()] if name in NAMES else values
        shape = entry["shape"] if name.startswith("extra") else -1
        out[name] = np.asarray(numbers).astype(entry["dtype"]).reshape(shape)
        if name in EDGES:
            out[f"{EDGES[name]}_start"] = np.cumsum(np.append(0, lists[0]), dtype=np.uint64)
        out |= {"topk_count": lists[1].astype(np.uint16)} if name == "topk_id" else {}
    return out


if __name__ == "__main__":
    shard = read_part(Path(sys.argv[1]), sys.argv[2])
    ids, scored = (shard[name][: shard["sequence_start"][1]] for name in ("token", "scored"))
    print("ids of the first rollout:", *ids)
    for i, sampled in enumerate(ids[scored == 1]):
        top, nats = shard["topk_id"][i, :3], shard["topk_logprob"][i, :3]
        print(f"{sampled}: {shard['sampled_logprob'][i]:.3f} nats; likeliest: {top} at {nats}")
