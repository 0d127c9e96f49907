"""`stillroom bench train --part loss`: time and memory of a distillation loss with its gradients,
beside other ways to compute one.

Every case is measured in a process of its own: first the memory, in its first run, then the time,
in turns with a chunked cross-entropy.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TypeVar

from stillroom.tools.bench_stream import alone, peak_kib

Result = TypeVar("Result")
MOST_ROUNDS = 5
DENSE_TENSORS = 8
"""(T, V) float32 tensors that a way over the whole vocabulary may hold at once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a loss."""

    tokens: int
    """T, scored positions."""
    vocab: int
    """V."""
    width: int
    """H, of student and teacher."""
    topk: int
    """K."""

    @property
    def logits_bytes(self) -> int:
        """One (T, V) float32."""
        return 4 * self.tokens * self.vocab

    @property
    def head_bytes(self) -> int:
        """One (V, H) float32."""
        return 4 * self.vocab * self.width


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute a loss; `bench_train_ways` does."""

    name: str
    dense: bool = False
    """Whether it holds (T, V) tensors."""
    package: str = ""
    """What must be installed."""

    @property
    def installed(self) -> bool:
        """Whether it can run."""
        return not self.package or find_spec(self.package) is not None


SMALL = Shape(tokens=8, vocab=64, width=8, topk=4)
YARDSTICK = Way("chunked cross-entropy")
WAYS = (
    YARDSTICK,
    Way("fused, forward KL"),
    Way("fused, reverse KL"),
    Way("fused, JSD"),
    Way("TRL chunked, forward KL", package="trl"),
    Way("TRL chunked, JSD", package="trl"),
    Way("Liger chunked, JSD", package="liger_kernel"),
    Way("cross-entropy", dense=True),
    Way("plain reference, forward KL", dense=True),
    Way("dense teacher, forward KL", dense=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How losses are measured."""

    loss_bytes: int
    """Memory of the fused loss, bytes; chunks of the cross-entropy have as many positions as its
    own."""
    threads: int
    seconds: float
    """Rounds of one case end after so long; one at least is taken, and MOST_ROUNDS at most."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossFigures:
    """One way on one shape."""

    name: str
    tokens: int
    vocab: int
    width: int
    loss: float
    """Nats a position."""
    peak_mb: float
    """What the process grew by at most, gradients included, MiB."""
    seconds: float
    """Of a run, the median."""
    ratio: float
    """Those by the seconds of chunked cross-entropy: the median over rounds."""
    rounds: int
    computed: bool = False
    """Whether it was measured at a part of the positions, for want of memory, and scaled up."""


def bench_losses(
    shapes: Sequence[Shape], ways: Sequence[Way], settings: Settings, done: Callable[[], None]
) -> list[LossFigures]:
    """Measure ways to compute a loss.

    Args:
        shapes: the sizes.
        ways: those of `WAYS` that are measured.
        settings: how.
        done: called after each.
    """
    figures = []
    for shape in shapes:
        for way in ways:
            figures.append(_figures(way, shape, settings))
            done()
    return figures


def _figures(way: Way, shape: Shape, settings: Settings) -> LossFigures:
    """A way that would not fit into memory is measured at fewer positions: all that it holds but
    the head's gradient, and its time, are in proportion to them."""
    parts = 1
    while way.dense and DENSE_TENSORS * shape.logits_bytes > parts * _available_bytes():
        parts *= 2
    found = alone(measure_way, way, replace(shape, tokens=shape.tokens // parts), settings)
    head_mb = shape.head_bytes / 2**20
    return replace(
        found,
        tokens=shape.tokens,
        peak_mb=parts * (found.peak_mb - head_mb) + head_mb,
        seconds=parts * found.seconds,
        computed=parts > 1,
    )


def measure_way(way: Way, shape: Shape, settings: Settings) -> LossFigures:
    """Measure one way; to be called in a process of its own."""
    import torch

    from stillroom.tools.bench_train_data import made_up_problem
    from stillroom.tools.bench_train_ways import COMPUTE, Chunks

    torch.set_num_threads(settings.threads)
    small = made_up_problem(SMALL)
    for name in (YARDSTICK.name, way.name):  # imports and thread pools are not the way's own
        COMPUTE[name](small, Chunks.of(small, settings.loss_bytes)).backward()  # type: ignore[no-untyped-call]
    problem = made_up_problem(shape, settings.seed)
    chunks = Chunks.of(problem, settings.loss_bytes)

    def run(name: str) -> tuple[float, float]:
        problem.hidden.grad = problem.weight.grad = None
        start = time.perf_counter()
        loss = COMPUTE[name](problem, chunks)
        loss.backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - start, float(loss.detach())

    peak_mb, (_, loss) = growth_mb(lambda: run(way.name))
    begun = time.perf_counter()
    times: list[tuple[float, float]] = []
    while not times or (
        len(times) < MOST_ROUNDS and time.perf_counter() - begun < settings.seconds
    ):
        times.append((run(YARDSTICK.name)[0], run(way.name)[0]))
    return LossFigures(
        name=way.name,
        tokens=shape.tokens,
        vocab=shape.vocab,
        width=shape.width,
        loss=loss,
        peak_mb=peak_mb,
        seconds=median(own for _, own in times),
        ratio=median(own / yardstick for yardstick, own in times),
        rounds=len(times),
    )


def growth_mb(run: Callable[[], Result]) -> tuple[float, Result]:
    """What this process grows by at most while a function runs, MiB, and what that returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes the present size
    before = peak_kib()
    result = run()
    return (peak_kib() - before) / 1024, result


def _available_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
