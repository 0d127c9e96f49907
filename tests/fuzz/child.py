"""One kind of file read again and again, its bytes changed as coverage suggests, in a process of
its own: `python -m tests.fuzz.child KIND SECONDS FOLDER`.

A bug of a C library, memory far beyond the data, and a hang end the process; `FOLDER/input` then
holds the bytes that did it.
"""

import itertools
import mmap
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from tests.fuzz.kinds import Kind

MAX_BYTES = 1 << 16
CPU_S = 5.0
"""Processor time that one input may take."""
FREE_BYTES, TIMES = 64 << 20, 50
"""Memory that one input may take: so much, and so many times its own bytes."""
PAGE_BYTES = resource.getpagesize()


class Recorder:
    """The bytes that are being read, in a file that outlives the process.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Make room for the longest input."""
        with path.open("wb+") as file:
            file.truncate(8 + MAX_BYTES)
            self._map = mmap.mmap(file.fileno(), 8 + MAX_BYTES)

    def record(self, data: bytes) -> None:
        """Write what is read next."""
        self._map[:8] = len(data).to_bytes(8, "little")
        self._map[8 : 8 + len(data)] = data


def recorded(path: Path) -> bytes:
    """What a process read when it ended."""
    whole = path.read_bytes()
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


class Limits:
    """Bounds on memory and time while one input is read."""

    def __init__(self, size: int) -> None:
        """Bounds for so many bytes."""
        self._most = FREE_BYTES + TIMES * size

    def __enter__(self) -> None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (held + self._most, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def write_samples(kind: "Kind", folder: Path) -> None:
    """The corpus to begin with: samples as they are, and changed ones."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for number, sample in enumerate(kind.samples()):
        (folder / f"sample-{number}").write_bytes(sample[:MAX_BYTES])
        for change in range(8):
            changed = kind.mutate(rng, sample)
            (folder / f"sample-{number}-{change}").write_bytes(changed)


def main() -> None:
    """Fuzz until the time is up."""
    name, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["stillroom"]):
        from tests.fuzz.kinds import KINDS, PLANTED, fuzz_one
    kind = (KINDS | PLANTED)[name]
    corpus = folder / "corpus"
    write_samples(kind, corpus)
    for sample in kind.samples():
        fuzz_one(name, sample)
    recorder = Recorder(folder / "input")

    end, runs = time.monotonic() + seconds, itertools.count()

    def read(data: bytes) -> None:
        recorder.record(data)
        try:
            with Limits(len(data)):
                fuzz_one(name, data)
        except BaseException:
            _leave(traceback.format_exc(), 1)
        count = next(runs)
        if time.monotonic() > end:
            _leave(f"{count + 1} inputs", 0)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return kind.mutate(rng, data)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    flags = [f"-max_len={MAX_BYTES}", "-rss_limit_mb=0", "-verbosity=0"]
    flags += [f"-artifact_prefix={folder}{os.sep}", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], read, custom_mutator=mutate)
    atheris.Fuzz()


def _leave(text: str, status: int) -> None:
    """End at once: a plain exit may wait for ever in the destructors of atheris."""
    print(text, flush=True)
    os._exit(status)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        _leave(traceback.format_exc(), 2)
