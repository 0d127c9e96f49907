"""The same scores in other stores: how each writes them, and reads them one sequence after another
into NumPy, or one sequence at random.

litdata and webdataset take part where they are installed.
"""

import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.cache.schema import Arrays

COLUMNS = (
    "topk_id",
    "topk_logprob",
    "tail_logprob",
    "sampled_logprob",
    "behaviour_logprob",
    "token",
)
"""What every store here holds of a sequence; Stillroom's own hold all columns."""
Rows = list[Arrays]


@dataclass(frozen=True, slots=True)
class Peer:
    """One other store."""

    name: str
    package: str
    write: Callable[[Rows, Path], None]
    sequential: Callable[[Path], Iterator[Arrays]]
    random: Callable[[Path], Callable[[int], Any]] | None


def peers() -> list[Peer]:
    """Those whose packages are installed."""
    return [peer for peer in ALL if importlib.util.find_spec(peer.package) is not None]


def rows_of(arrays: Arrays) -> Rows:
    """One dictionary of arrays a sequence."""
    tokens, positions = (arrays[n].astype(int) for n in ("sequence_start", "position_start"))
    out = []
    for i in range(len(arrays["prompt_length"])):
        own = {n: arrays[n][positions[i] : positions[i + 1]] for n in COLUMNS[:-1]}
        out.append(own | {"token": arrays["token"][tokens[i] : tokens[i + 1]]})
    return out


def _write_blosc(rows: Rows, folder: Path) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    group = zarr.create_group(str(folder / "blosc.zarr"))
    codec = BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    for name in COLUMNS:
        data = np.concatenate([row[name] for row in rows])
        shape = (2048, *data.shape[1:])
        array = group.create_array(
            name, shape=data.shape, chunks=shape, dtype=data.dtype, compressors=codec
        )
        array[...] = data
    for name in ("token", "topk_id"):
        edges = np.cumsum([0, *(len(row[name]) for row in rows)])
        group.create_array(f"{name}_start", data=edges)


def _blosc(folder: Path) -> Callable[[int, int], Arrays]:
    import zarr

    group: Any = zarr.open_group(str(folder / "blosc.zarr"), mode="r")
    starts = {name: group[f"{name}_start"][...] for name in ("token", "topk_id")}

    def read(first: int, last: int) -> Arrays:
        out = {}
        for name in COLUMNS:
            edges = starts["token" if name == "token" else "topk_id"]
            out[name] = group[name][edges[first] : edges[last]]
        return out

    read.rows = len(starts["token"]) - 1  # type: ignore[attr-defined]
    return read


def _read_blosc(folder: Path) -> Iterator[Arrays]:
    read = _blosc(folder)
    count: int = read.rows  # type: ignore[attr-defined]
    for first in range(0, count, 64):
        yield read(first, min(first + 64, count))


def _random_blosc(folder: Path) -> Callable[[int], Arrays]:
    read = _blosc(folder)
    return lambda i: read(i, i + 1)


def _table(rows: Rows) -> pa.Table:
    def column(name: str) -> pa.Array:
        flat = np.concatenate([row[name].reshape(-1) for row in rows])
        edges = np.cumsum([0, *(row[name].size for row in rows)]).astype(np.int32)
        return pa.ListArray.from_arrays(edges, pa.array(flat))

    return pa.table({name: column(name) for name in COLUMNS})


def _write_parquet(rows: Rows, folder: Path) -> None:
    pq.write_table(_table(rows), folder / "rows.parquet", compression="zstd", row_group_size=16)


def _read_parquet(folder: Path) -> Iterator[Arrays]:
    file = pq.ParquetFile(folder / "rows.parquet")
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        yield {
            n: table[n].combine_chunks().flatten().to_numpy(zero_copy_only=False) for n in COLUMNS
        }


def _random_parquet(folder: Path) -> Callable[[int], Arrays]:
    file = pq.ParquetFile(folder / "rows.parquet")

    def read(i: int) -> Arrays:
        table = file.read_row_group(i // 16, use_threads=False).slice(i % 16, 1)
        return {
            n: table[n].combine_chunks().flatten().to_numpy(zero_copy_only=False) for n in COLUMNS
        }

    return read


def _write_datasets(rows: Rows, folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(_table(rows)).to_parquet(folder / "datasets.parquet")


def _datasets(folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    cache = str(folder / "datasets-cache")
    files = str(folder / "datasets.parquet")
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=cache
    ).with_format("numpy")


def _read_datasets(folder: Path) -> Iterator[Arrays]:
    yield from _datasets(folder)


def _random_datasets(folder: Path) -> Callable[[int], Arrays]:
    found = _datasets(folder)
    return lambda i: found[i]


def _write_litdata(rows: Rows, folder: Path) -> None:
    from litdata.streaming import Cache

    cache = Cache(str(folder / "litdata"), chunk_bytes="64MB", compression="zstd")
    for i, row in enumerate(rows):
        cache[i] = dict(row)
    cache.done()
    cache.merge()


def _litdata(folder: Path) -> Any:
    from litdata import StreamingDataset

    return StreamingDataset(str(folder / "litdata"))


def _read_litdata(folder: Path) -> Iterator[Arrays]:
    yield from _litdata(folder)


def _random_litdata(folder: Path) -> Callable[[int], Arrays]:
    found = _litdata(folder)
    return lambda i: found[i]


def _write_webdataset(rows: Rows, folder: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(folder / "rows.tar")) as sink:
        for i, row in enumerate(rows):
            packed = io.BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **row)
            sink.write({"__key__": f"{i:08d}", "npz": packed.getvalue()})


def _read_webdataset(folder: Path) -> Iterator[Arrays]:
    import webdataset

    found = webdataset.WebDataset(str(folder / "rows.tar"), shardshuffle=False)
    for item in found:
        with np.load(io.BytesIO(item["npz"])) as packed:
            yield {name: packed[name] for name in packed.files}


ALL = (
    Peer("Zarr, Blosc zstd-5", "zarr", _write_blosc, _read_blosc, _random_blosc),
    Peer("Parquet, zstd", "pyarrow", _write_parquet, _read_parquet, _random_parquet),
    Peer("HF datasets", "datasets", _write_datasets, _read_datasets, _random_datasets),
    Peer("litdata, zstd", "litdata", _write_litdata, _read_litdata, _random_litdata),
    Peer("webdataset, npz", "webdataset", _write_webdataset, _read_webdataset, None),
)
