"""One kind of file read again and again, its bytes changed as coverage suggests, in a process of
its own: `python -m tests.fuzz.child KIND SECONDS FOLDER`.

A bug of a C library, memory far beyond the data, and a hang end the process; `FOLDER/input` then
holds the bytes that did it.
"""

import itertools
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

from tests.fuzz.limits import Limits
from tests.fuzz.mutate import MAX_BYTES
from tests.fuzz.recorder import Recorder

if TYPE_CHECKING:
    from tests.fuzz.kinds import Kind


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
