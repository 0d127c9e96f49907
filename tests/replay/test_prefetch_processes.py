"""A stream stays in the process that made it, and ends with it."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.store import Cache
from tests.replay.conftest import add_scored_part
from tests.replay.test_prefetch import open_stream


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_does_not_travel(scored_cache: Cache, duplicate: Callable[[Any], Any]) -> None:
    with open_stream(scored_cache) as stream:
        stream.next_batch()
        with pytest.raises(ConfigError, match="a process of its own"):
            duplicate(stream)


FORK = """
import gc, os, sys
from stillroom.cache.errors import ForkedError
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.step import Position, Step
from stillroom.replay.stream import ReplayStream

cache = Cache.open(sys.argv[1])
config = StreamConfig(batch_rows=5, max_tokens=40, block_rows=4, window_rows=5, threads=2)
stream = ReplayStream(Source(cache, cache.snapshot()), config)
rows = [stream.next_batch().rows for _ in range(3)]
child = os.fork()
if not child:
    for use in (stream.next_batch, lambda: next(iter(stream)), lambda: stream.skip(1),
                lambda: stream.load_state_dict(stream.state_dict())):
        try:
            use()
        except ForkedError as error:
            assert "the process that made it" in str(error) and "spawn" in str(error)
        else:
            os._exit(3)
    stream.close()
    del stream, use
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
rows += [stream.next_batch().rows for _ in range(3)]
again = ReplayStream(Source(cache, cache.snapshot()), config)
assert rows == [again.next_batch().rows for _ in range(6)]
print("the child refused, and the parent went on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_is_refused_at_once_and_ends(scored_cache: Cache) -> None:
    command = [sys.executable, "-c", FORK, str(scored_cache.storage.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the child refused, and the parent went on\n"


def test_a_program_that_ends_without_closing_ends(scored_cache: Cache) -> None:
    script = FORK.split("child = ")[0] + "print('the end')"
    command = [sys.executable, "-c", script, str(scored_cache.storage.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


FAILING = """
import os, sys, time
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.reader import RowReader
from stillroom.replay.stream import ReplayStream

log, read = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), RowReader.read

def slow(reader, block):
    os.write(log, b"r")
    time.sleep(0.2)
    return read(reader, block)

RowReader.read = slow
cache = Cache.open(sys.argv[1])
config = StreamConfig(batch_rows=2, max_tokens=40, block_rows=1, window_rows=5, threads=2)
stream = ReplayStream(Source(cache, cache.snapshot()), config)
stream.next_batch()
os.write(log, b"|")
raise ArithmeticError("the loss is not finite")
"""


def test_a_program_that_fails_reads_no_more_of_what_is_queued(
    empty_cache: Cache, tmp_path: Path
) -> None:
    """The interpreter waits for threads; they read on for a moment, but not all of the 120 blocks
    that are on their way."""
    add_scored_part(empty_cache, 0, 0, 150)
    command = [sys.executable, "-c", FAILING, str(empty_cache.storage.root), str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("ArithmeticError: the loss is not finite\n")
    before, _, after = (tmp_path / "log").read_text().partition("|")
    assert len(before) >= 2
    assert len(after) < 40


OUTLIVING = """
import sys, threading
from stillroom.cache.store import Cache
from stillroom.replay.config import StreamConfig
from stillroom.replay.feed import Source
from stillroom.replay.stream import ReplayStream

cache = Cache.open(sys.argv[1])
stream = ReplayStream(Source(cache, cache.snapshot()), StreamConfig(batch_rows=1, max_tokens=40))
begun = threading.Event()

def train():
    try:
        for _ in stream:
            begun.set()
    except Exception as error:
        print(type(error).__name__, error)
    stream.close()

threading.Thread(target=train).start()
begun.wait()
"""


def test_a_stream_that_outlives_the_main_thread_says_so(scored_cache: Cache) -> None:
    command = [sys.executable, "-c", OUTLIVING, str(scored_cache.storage.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ConfigError stream: expected a running interpreter")
