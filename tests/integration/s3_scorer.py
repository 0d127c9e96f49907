"""A scorer in a process of its own: `python -m tests.integration.s3_scorer ROOT`.

Says "ready" when it could begin, waits for a line, and prints the parts that it committed.
"""

import sys

from stillroom.cache.score import score
from stillroom.cache.store import Cache
from tests.cache.fakes import FakeTeacher

if __name__ == "__main__":
    cache = Cache.open(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    print(*score(cache, FakeTeacher()).scored)
