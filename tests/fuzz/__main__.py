"""`python -m tests.fuzz`: fuzzes the readers of every kind of file, each in a process of its own,
and prints the bytes that any of them cannot stand."""

import argparse
import base64
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.kinds import KINDS, PLANTED, fuzz_one
from tests.fuzz.limits import Limits
from tests.fuzz.recorder import recorded

ROOT = Path(__file__).resolve().parents[2]
STARTING_S = 45.0


def main() -> int:
    """Fuzz some kinds, or read one input again; 1 if there was a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"some of: {', '.join(KINDS)}; none: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kinds at once")
    parser.add_argument("--again", help="base64 of bytes to read as the one kind that is named")
    args = parser.parse_args()
    kinds = args.kinds or list(KINDS)
    unknown = sorted(set(kinds) - KINDS.keys() - PLANTED.keys())
    if unknown:
        parser.error(f"no such kinds: {', '.join(unknown)}")
    if args.again is not None:
        data = base64.b64decode(args.again)
        with Limits(len(data)):
            fuzz_one(kinds[0], data)
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        sound = list(pool.map(partial(fuzz_kind, seconds=args.seconds), kinds))
    found = [kind for kind, is_sound in zip(kinds, sound, strict=True) if not is_sound]
    print(f"fuzz: {len(kinds)} kinds of files, findings: {', '.join(found) or 'none'}")
    return 1 if found else 0


def fuzz_kind(kind: str, seconds: float) -> bool:
    """Fuzz one kind; False, and a report, if its readers cannot stand something."""
    start = time.perf_counter()
    with TemporaryDirectory(prefix="stillroom-fuzz-") as name:
        folder = Path(name)
        status = _run(kind, seconds, folder)
        output = (folder / "output").read_text(errors="replace")
        if status == 0:
            count = output.splitlines()[-1]
            print(f"{kind}: {count} in {time.perf_counter() - start:.0f} s", flush=True)
            return True
        path = folder / "input"
        print(_report(kind, status, recorded(path) if path.is_file() else b"", output), flush=True)
    return False


def _run(kind: str, seconds: float, folder: Path) -> int:
    """Exit status of a process that fuzzes a kind; its output is in the folder."""
    module = [sys.executable, "-m", "tests.fuzz.child"]
    command = [*module, kind, f"{seconds:.1f}", str(folder)]
    own = {"TMPDIR": str(folder), "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error,ignore:Numcodecs"}
    with (folder / "output").open("w") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            return child.wait(seconds + STARTING_S)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def _report(kind: str, status: int, data: bytes, output: str) -> str:
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    lines = [line for line in output.splitlines() if not line.startswith(("INFO:", "WARNING:"))]
    packed = base64.b64encode(data).decode()
    return "\n".join(
        [
            f"{kind}: FINDING ({how}) on these {len(data)} bytes (base64):",
            packed,
            f"again: python -m tests.fuzz {kind!r} --again {packed[:12]}...",
            *lines[-40:],
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
