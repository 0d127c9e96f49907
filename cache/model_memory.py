"""Whether a model fits into memory, told from its files' headers before any weight is read."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import ModelFiles, tensors_of

FLOATS = ("F64", "F32", "F16", "BF16")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit and use of a control group of version 2 and 1, and what of its statistics is idle."""
OWN_CGROUPS = Path("/proc/self/cgroup")


def check_fits(files: ModelFiles, dtype: str, device: torch.device) -> None:
    """Refuse a model whose weights alone are more than is free: in main memory, through which they
    are loaded in any case, and on the device.

    Raises:
        InputError: says how much it takes and how much there is.
    """
    needed = weight_bytes(files, dtype)
    places: list[tuple[str, int | None]] = [("main memory", free_bytes())]
    if device.type == "cuda":
        places.append((f"the memory of {device}", torch.cuda.mem_get_info(device)[0]))
    for place, free in places:
        if free is not None and needed > free:
            raise InputError(
                str(files.folder),
                f"weights that fit into the {free / 1e9:,.1f} GB that are free in {place}",
                f"{needed / 1e9:,.1f} GB in {dtype}",
                "Use a smaller dtype or a larger machine; over several GPUs the backend vllm runs "
                "a teacher, and train.parallel fsdp trains a student, which each process reads "
                "into main memory first.",
            )


def weight_bytes(files: ModelFiles, dtype: str) -> int:
    """Bytes of a model's weights once they are loaded in a dtype; quantised ones stay as they
    are stored."""
    entries = [entry for _, entry in tensors_of(files.folder).values()]
    quantised = "quantization_config" in files.config
    width = getattr(torch, dtype).itemsize
    return sum(
        _stored(e) if quantised or e["dtype"] not in FLOATS else _count(e) * width for e in entries
    )


def free_bytes() -> int | None:
    """Main memory that this process may still take, bytes; None where the system does not tell."""
    if not MEMINFO.is_file():
        return None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    available = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
    allowed = _allowed_bytes()
    found = [size for size in (available, allowed) if size is not None]
    return min(found, default=None)


def _allowed_bytes() -> int | None:
    """What the limits of this process's control groups leave, the least; None without any."""
    found = [_left_in(folder) for folder in _own_cgroups()]
    return min((size for size in found if size is not None), default=None)


def _own_cgroups() -> Iterator[Path]:
    """Folders of the control groups that limit this process's memory, from its own to the root; a
    container sees its own as the root, whatever they are called."""
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []
    for line in (*lines, "0::/", "0:memory:/"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUP / "memory" if controllers else CGROUP
        own = top / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _left_in(folder: Path) -> int | None:
    """What the limit of a control group of version 2 or 1 leaves; None without one."""
    for limit, usage, idle in CGROUP_FILES:
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            words = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        except (OSError, ValueError):
            continue
        cached = sum(int(value) for name, value in words if name == idle)
        return int(most) - used + cached if most.isdecimal() else None
    return None


def _count(entry: Mapping[str, Any]) -> int:
    return prod(entry["shape"])


def _stored(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)
