"""A real vLLM server on the loopback: its scores are the model's, and one that is killed in the
middle of a job and started again costs nothing but time."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillroom.cache.errors import ConfigError, InputError, MismatchError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.load_teacher import load_teacher
from stillroom.cache.part import PartMeta
from stillroom.cache.score import score
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.store import Cache
from stillroom.cache.teacher import (
    RowScores,
    ScoreRow,
    ScoreSpec,
    Teacher,
    TeacherConfig,
    identity_of,
    stats_of,
)
from tests.cache.fakes import make_meta, random_rollouts

pytestmark = pytest.mark.vllm

TOPK = 12
FLAGS = "--dtype float32 --enforce-eager --max-num-seqs 8 --kv-cache-memory-bytes 67108864"


class Server:
    """A server of a model that can be killed and started again at the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        """Start it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.start()

    @property
    def url(self) -> str:
        """Its base address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process, which answers later."""
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        model = ["--model", str(self.folder), "--served-model-name", "teacher"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                    *(*address, *model, *FLAGS.split(), "--max-logprobs", str(TOPK)),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill it and the processes that it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def files(teacher_model: Path) -> ModelFiles:
    """The model's."""
    return inspect_model(str(teacher_model))


@pytest.fixture(scope="module")
def server(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server."""
    running = Server(teacher_model, tmp_path_factory.mktemp("server") / "log.txt")
    yield running
    running.kill()


@pytest.fixture(scope="module")
def config(server: Server, files: ModelFiles) -> TeacherConfig:
    """Settings of the teacher that it runs."""
    settings = ServerConfig(urls=(server.url,), max_tokens_in_flight=40, patience_s=600)
    return TeacherConfig(model=str(files.folder), backend="server", server=settings)


@pytest.fixture(scope="module")
def remote(files: ModelFiles, config: TeacherConfig) -> Teacher:
    """The teacher behind it."""
    return load_teacher(files, config)


@pytest.fixture(scope="module")
def local(files: ModelFiles) -> Teacher:
    """The same model here."""
    return load_teacher(files, TeacherConfig(model=str(files.folder), device="cpu"))


def make_cache(root: Path, files: ModelFiles, parts: int) -> Cache:
    """A cache of this teacher with random rollouts."""
    identity = identity_of(files, TeacherConfig(model=str(files.folder)), ScoreSpec(topk=TOPK))
    cache = Cache.create(root, identity)
    for number in range(parts):
        cache.add_part(random_rollouts(number, 40), _meta(number, files))
    return cache


def _meta(number: int, files: ModelFiles) -> PartMeta:
    fingerprint = files.tokenizer_fingerprint
    return make_meta(number, tokenizer_fingerprint=fingerprint, vocab_size=files.vocab_size)


def test_scores_are_those_of_transformers(remote: Teacher, local: Teacher) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for length in (2, 5, 33, 64, 100, 158):
        token = rng.integers(0, 262, length).astype(np.uint32)
        rows.append(ScoreRow(token, np.arange(max(1, length // 3), length)))
    spec = ScoreSpec(topk=TOPK)
    mine, theirs = (dict(teacher.score(rows, spec)) for teacher in (remote, local))
    assert sorted(mine) == sorted(theirs) == list(range(len(rows)))
    for i in range(len(rows)):
        assert_near(mine[i], theirs[i])


def assert_near(mine: RowScores, theirs: RowScores) -> None:
    """Within what the order of additions makes, and the rounding to float16."""
    np.testing.assert_allclose(mine.sampled_logprob, theirs.sampled_logprob, atol=5e-4)
    for ids, logprobs, other_ids, other_logprobs in zip(
        mine.topk_id, mine.topk_logprob, theirs.topk_id, theirs.topk_logprob, strict=True
    ):
        expected = dict(zip(other_ids.tolist(), other_logprobs.tolist(), strict=True))
        common = [i for i, token in enumerate(ids.tolist()) if token in expected]
        assert len(common) >= TOPK - 1
        at = [expected[token] for token in ids[common].tolist()]
        np.testing.assert_allclose(logprobs[common], at, rtol=2**-10, atol=5e-4)
    tail, expected_tail = (np.exp(s.tail_logprob.astype(np.float64)) for s in (mine, theirs))
    np.testing.assert_allclose(tail, expected_tail, rtol=2e-3, atol=1e-5)


def test_its_numeric_class_is_of_the_servers_version(remote: Teacher) -> None:
    import vllm

    assert remote.numeric_class == f"server-vllm-{vllm.__version__}-float32"


def test_what_the_server_is_not_set_up_for_is_refused(
    files: ModelFiles, config: TeacherConfig, remote: Teacher
) -> None:
    rows = [ScoreRow(np.arange(9, dtype=np.uint32), np.array([4]))]
    with pytest.raises(ConfigError, match=r"--max-logprobs 13 or more"):
        list(remote.score(rows, ScoreSpec(topk=TOPK + 1)))
    longest = [ScoreRow(np.zeros(160, np.uint32), np.array([4]))]
    with pytest.raises(InputError, match=r"159 tokens; got 160 tokens.*--max-model-len"):
        list(remote.score(longest, ScoreSpec(topk=TOPK)))
    other = replace(config, server=replace(config.server, model="student"))
    with pytest.raises(MismatchError, match="the model student; got teacher"):
        load_teacher(files, other)


class Killing:
    """A teacher whose server is killed once some rows are scored, and started again."""

    def __init__(self, teacher: Teacher, server: Server, after: int) -> None:
        """Wrap it."""
        self.teacher, self.server, self.after = teacher, server, after
        self.numeric_class = teacher.numeric_class
        self.indices: list[list[int]] = []
        """Of the rows that came, call by call."""

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """See `teacher.Teacher`."""
        self.indices.append([])
        for index, scores in self.teacher.score(rows, spec):
            self.indices[-1].append(index)
            yield index, scores
            self.after -= len(rows) == 40
            if self.after == 0:
                self.server.kill()
                self.server.start()


def test_a_server_that_is_killed_and_started_again_loses_nothing(
    tmp_path: Path, files: ModelFiles, remote: Teacher, local: Teacher, server: Server
) -> None:
    cache, other = (make_cache(tmp_path / name, files, 2) for name in "ab")
    assert len(score(other, local).scored) == 2
    killing = Killing(remote, server, after=15)
    report = score(cache, killing)
    assert killing.after < 0
    assert [sorted(found) for found in killing.indices] == [list(range(n)) for n in (8, 40, 40)]
    assert stats_of(remote)["retries"] >= 1
    assert len(report.scored) == len(cache.commits()) == 2
    for part in cache.commits():
        mine, theirs = (each.read(part) for each in (cache, other))
        assert (mine["token"] == theirs["token"]).all()
        np.testing.assert_allclose(mine["sampled_logprob"], theirs["sampled_logprob"], atol=5e-4)
