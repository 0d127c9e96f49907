"""Read a cache without Stillroom: numpy, xxhash, pcodec for Zarr shards, pyarrow for Parquet shards.

    python read_cache.py CACHE [PART]

prints, for the first position of a part's first rollout, what the teacher expected.
Every byte is checked against the hash that the commit vouches for before it is decoded.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import xxhash

CHUNK_ROWS = 2048


def checked(data, expected):
    if xxhash.xxh3_128_hexdigest(data) != expected:
        raise ValueError(f"damaged: {len(data)} bytes do not have the hash {expected}")
    return data


def live_commits(root):
    """Part -> commit: of each part the one with the largest n that is not in quarantine."""
    out = {}
    for path in root.glob("commits/v*/*.json"):
        part, n = re.fullmatch(r"(v\d{6,9}-[0-9a-f]{16})\.(\d+)\.json", path.name).groups()
        if not (root / "quarantine" / path.name).exists() and int(n) >= out.get(part, (0,))[0]:
            out[part] = int(n), json.loads(path.read_bytes())
    return {part: commit for part, (_, commit) in out.items()}


def read_zarr(path, manifest):
    """All arrays of a Zarr shard, straight from the ranges in its manifest."""
    from pcodec import standalone

    arrays = {}
    with path.open("rb") as file:
        for name, entry in manifest["arrays"].items():
            rows, *width = entry["shape"]
            array = np.empty((len(entry["chunks"]) * CHUNK_ROWS, *width), entry["dtype"])
            for i, (offset, length, digest) in enumerate(entry["chunks"]):
                file.seek(offset)
                chunk = array[i * CHUNK_ROWS : (i + 1) * CHUNK_ROWS].reshape(-1)
                done = standalone.simple_decompress_into(checked(file.read(length), digest), chunk)
                if done.n_processed != chunk.size or not done.finished:
                    raise ValueError(f"damaged: {name}, chunk {i} holds another count")
            arrays[name] = array[:rows]
    groups, width = (manifest["attributes"][k] for k in ("id_groups", "id_group_width"))
    code, group, ids = (arrays.pop(f"topk_{k}") for k in ("code", "group", "list"))
    in_group = code < width
    index = np.where(in_group, group[:, None] * width, groups * width - width) + code.astype(int)
    return arrays | {"topk_id": ids[index]}


def read_shard(root, commit):
    folder = root / "scores" / commit["part"] / commit["attempt"]
    manifest = json.loads(checked((folder / "manifest.json").read_bytes(), commit["manifest_hash"]))
    if (folder / "shard.zarr.zip").exists():
        return read_zarr(folder / "shard.zarr.zip", manifest)
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = checked((folder / "shard.parquet").read_bytes(), manifest["hash"])
    return pq.ParquetFile(pa.BufferReader(data)).read()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    commits = live_commits(root)
    part = sys.argv[2] if len(sys.argv) > 2 else min(commits)
    shard = read_shard(root, commits[part])
    print(part, {n: getattr(a, "shape", None) for n, a in shard.items()} if isinstance(shard, dict) else shard.schema)
