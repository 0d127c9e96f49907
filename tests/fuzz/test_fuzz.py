"""Whatever a file of any kind holds, its readers give a value or an error that says what is wrong.

A short run with the same changes every time; `make fuzz` looks on, led by coverage.
"""

import base64
import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.kinds import KINDS, PLANTED, fuzz_one
from tests.fuzz.mutate import mutate_bytes, mutate_json

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 12


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_read(kind: str) -> None:
    """Every sample is a valid file, or the changes would begin at nothing."""
    for sample in KINDS[kind].samples():
        KINDS[kind].read(sample)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), plain=st.booleans())
def test_changed_samples(kind: str, seed: int, plain: bool) -> None:
    rng = random.Random(seed)
    sample = rng.choice(KINDS[kind].samples())
    data = mutate_bytes(rng, sample) if plain else KINDS[kind].mutate(rng, sample)
    try:
        fuzz_one(kind, data)
    except BaseException as error:
        packed = base64.b64encode(data).decode()
        error.add_note(f"python -m tests.fuzz {kind!r} --again {packed}")
        raise


@pytest.mark.parametrize(
    "sample", [rb'{"a":"\udff0x"}', b"[1" + b"0" * 400 + b",0.5,1e308]", b"[[[]],{}]"]
)
def test_changes_can_be_changed_again(sample: bytes) -> None:
    """What coverage keeps is changed on: lone surrogates and long integers are no obstacle."""
    rng = random.Random(0)
    for _ in range(300):
        data = sample
        for _ in range(4):
            data = mutate_json(rng, data)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris")
@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_bug_is_found(kind: str) -> None:
    """An exception, a crash, memory and a hang each end the run, with the bytes that did it."""
    command = [sys.executable, "-m", "tests.fuzz", kind, "--seconds", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.search(rf"^{kind}: FINDING .* bytes \(base64\):\n(\S+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert b"!" in base64.b64decode(found[1])
