"""`stillroom bench`: measures this machine on a cache's own scores, or on made-up ones, and prints
a table."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from stillroom.cache.errors import ConfigError
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.tools.bench_quality_cells import Study
from stillroom.tools.render import print_json, print_table, say

if TYPE_CHECKING:
    from stillroom.tools.bench_open import Opening
    from stillroom.tools.bench_store import Figures

STORE_POSITIONS, REPLAY_POSITIONS, SCORE_POSITIONS = 65_536, 262_144, 1_000_000
TRAIN_PARTS, SCORE_PARTS = ("loss", "step", "ranks"), ("engines", "front", "memory")
STORE_COLUMNS = ("store", "B/position", "write M/s", "read M/s", "of the limit", "random ms")
NOTE = (
    "Stillroom's stores hold every column and check every byte; the others hold six columns and"
    " check none. Hugging Face datasets and litdata unpack a copy before they read at random."
)
OPEN_COLUMNS = ("shards", "first snapshot s", "next s", "open s", "memory MiB", "file MiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Measure stores on the same scores in one run: bytes, writing, reading, and opening against
    the number of shards. Or replay: what a stream delivers, beside other loaders. Or train: what a
    loss and a whole step cost, beside other trainers. Or score: what scoring costs beside the
    teacher's model alone. Or quality: how near students come to their teacher by replay, and by TRL
    on-policy."""

    what: Positional[Literal["store", "replay", "train", "score", "quality"]]
    """What to measure."""
    root: Positional[str | None] = None
    """A cache whose scores are used; None makes some up, which is good for speeds only."""
    positions: int | None = None
    """Scored tokens to measure on, at least; a cache's parts are taken whole. None: 65,536 for the
    store, 262,144 for replay, 1,000,000 for the memory of scoring."""
    topk: int = 64
    """K of made-up scores, and of scoring."""
    commits: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Numbers of shards to measure opening at; none leaves that out."""
    peers: bool = True
    """Measure other stores too: plain Zarr and Parquet, Hugging Face datasets, and litdata and
    webdataset where they are installed; of training and of quality TRL, of training Liger too; of
    scoring vLLM."""
    s3: bool = False
    """Replay: measure from an object store too, moto's server on the loopback."""
    tokens_per_s: float = 260_000.0
    """Replay: what the simulated trainer takes, tokens a second."""
    rows: int = 12_288
    """Replay: rows of the snapshot at least; a small cache's parts are listed more than once."""
    part: Literal["all", "loss", "step", "ranks", "engines", "front", "memory"] = "all"
    """Train: a loss alone, a whole step, or a step in two processes and in bfloat16. Score: the
    engines, scores made of an engine's arrays, or memory."""
    tokens: tuple[int, ...] = (4_096, 16_384)
    """Train: scored positions that a loss is measured at."""
    vocab_sizes: tuple[int, ...] = (49_152, 151_936)
    """Train: vocabularies that it is measured at."""
    width: int = 576
    """Train: width of the hidden states that it is measured at."""
    loss_bytes: int = 1 << 28
    """Train: memory of the loss beyond hidden states, head and their gradients."""
    seconds: float = 60.0
    """Train: after so long no further round of a loss begins."""
    models: str = "~/.cache/stillroom/quickstart"
    """Train and score: folder of the quickstart's models and prompts."""
    step_tokens: tuple[int, int] = (136, 64)
    """Train and score: tokens of the prompt and of the completion of each of a step's 8 rows."""
    steps: int = 10
    """Train and score: steps that are measured; of scoring, rounds over all rows."""
    threads: int = 2
    """Train and score: threads of everything that is measured."""
    output: str = "runs/quality"
    """Quality: folder of the results; cells whose results are there are not run again."""
    only: tuple[str, ...] = ()
    """Quality: cells to run, such as replay-16.forward.0 or '*.0'. Train: losses to measure, like
    'fused*'. All if nothing is said."""
    report: str | None = None
    """Quality: run nothing, print the table, and draw the curves into this folder."""
    study: Study = field(default_factory=Study)
    """Quality: what decides the results."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Check ranges."""
        positions = 1 if self.positions is None else self.positions
        if min(positions, self.topk, self.rows, *self.commits) < 1 or not self.tokens_per_s > 0:
            got = f"{positions}, {self.topk}, {self.rows}, {self.commits}, {self.tokens_per_s}"
            names = "positions, topk, rows, commits, tokens_per_s"
            raise ConfigError(names, "at least 1, and above 0", got, "Raise them.")
        sizes = (*self.tokens, *self.vocab_sizes, self.width, *self.step_tokens)
        if min(*sizes, self.steps, self.threads) < 1 or self.topk > min(self.vocab_sizes):
            got = f"{self.tokens}, {self.vocab_sizes}, {self.width}, {self.step_tokens}"
            names = "tokens, vocab_sizes (topk too), width, step_tokens, steps, threads"
            got = f"{got}, {self.steps}, {self.threads}"
            raise ConfigError(names, "at least 1 (at least topk)", got, "Raise them.")
        parts = {"train": TRAIN_PARTS, "score": SCORE_PARTS}.get(self.what, ())
        if self.part not in ("all", *parts):
            raise ConfigError("part", f"all, {', '.join(parts)}", self.part, "Change it.")


def run_bench(job: Bench) -> int:
    """`stillroom bench`."""
    measure = {
        "store": _store,
        "replay": _replay,
        "train": _train,
        "score": _score,
        "quality": _quality,
    }
    return measure[job.what](job)


def _quality(job: Bench) -> int:
    from stillroom.tools import bench_quality, bench_quality_report

    output, failed = local_path(job.output).absolute(), []
    if job.report is None:
        failed = bench_quality.run_study(job.study, output, only=job.only, with_trl=job.peers)
    curves = bench_quality.finished(job.study, output)
    if job.json:
        print_json(bench_quality_report.as_json(job.study, curves))
    else:
        bench_quality_report.print_report(job.study, curves)
    if job.report is not None:
        drawn = bench_quality_report.draw(curves, local_path(job.report))
        found = ", ".join(map(str, drawn)) or "nothing, as matplotlib is not installed"
        print(f"drawn: {found}", file=sys.stderr)
    return 1 if failed else 0


def _train(job: Bench) -> int:
    from stillroom.tools import bench_train, bench_train_loss, bench_train_rows

    if job.root is not None:
        do = "Leave it out: training is measured on rows that the benchmark makes."
        raise ConfigError("root", "nothing", job.root, do)
    prompt, completion = job.step_tokens
    figures = bench_train.bench_train(
        TRAIN_PARTS if job.part == "all" else (job.part,),
        shapes=[
            bench_train_loss.Shape(tokens, vocab, job.width, job.topk)
            for vocab in job.vocab_sizes
            for tokens in job.tokens
        ],
        losses=bench_train_loss.Settings(
            loss_bytes=job.loss_bytes, threads=job.threads, seconds=job.seconds
        ),
        models=local_path(job.models),
        sizes=bench_train_rows.Sizes(prompt=prompt, completion=completion, topk=job.topk),
        steps=job.steps,
        threads=job.threads,
        with_peers=job.peers,
        only=job.only,
    )
    if job.json:
        print_json(bench_train.as_json(figures))
    else:
        bench_train.print_figures(figures)
    return 0


def _score(job: Bench) -> int:
    from stillroom.tools import bench_score, bench_train_rows

    if job.root is not None:
        do = "Leave it out: scoring is measured on the quickstart's prompts and made-up scores."
        raise ConfigError("root", "nothing", job.root, do)
    prompt, completion = job.step_tokens
    figures = bench_score.bench_score(
        SCORE_PARTS if job.part == "all" else (job.part,),
        models=local_path(job.models),
        sizes=bench_train_rows.Sizes(prompt=prompt, completion=completion, topk=job.topk),
        rounds=job.steps,
        threads=job.threads,
        positions=job.positions or SCORE_POSITIONS,
        with_vllm=job.peers,
    )
    if job.json:
        print_json(bench_score.as_json(figures))
    else:
        bench_score.print_figures(figures)
    return 0


def _replay(job: Bench) -> int:
    from stillroom.tools import bench_replay

    figures = bench_replay.bench_replay(
        job.root,
        positions=job.positions or REPLAY_POSITIONS,
        topk=job.topk,
        tokens_s=job.tokens_per_s,
        with_peers=job.peers,
        with_s3=job.s3,
        rows=job.rows,
    )
    if job.json:
        print_json(bench_replay.as_json(figures))
    else:
        bench_replay.print_figures(figures)
    return 0


def _store(job: Bench) -> int:
    from stillroom.tools import bench_data, bench_open, bench_store

    positions = job.positions or STORE_POSITIONS
    if job.root is None:
        sample = bench_data.made_up(positions, job.topk)
    else:
        sample = bench_data.from_cache(Cache.open(job.root), positions)
    figures = bench_store.bench_store(sample, with_peers=job.peers)
    openings = bench_open.bench_open(sample.identity, list(job.commits))
    if job.json:
        source = {"scores": sample.source, "positions": sample.positions}
        stores, opened = bench_store.as_json(figures), bench_open.as_json(openings)
        print_json({**source, "stores": stores, "openings": opened})
        return 0
    say(f"{sample.positions:,} positions at K = {sample.identity.topk}, {sample.source}")
    _stores(figures)
    if job.peers:
        say(NOTE)
    columns = figures[0].columns or {}
    largest = sorted(columns.items(), key=lambda item: -item[1])[:8]
    say("bytes a position, zarr: " + ", ".join(f"{name} {size:.1f}" for name, size in largest))
    if openings:
        _openings(openings)
    return 0


def _stores(figures: "list[Figures]") -> None:
    rows = [
        (
            row.store,
            round(row.bytes_per_position, 1),
            round(row.write_positions_s / 1e6, 3),
            round(row.read_positions_s / 1e6, 3),
            None if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
            None if row.random_ms is None else round(row.random_ms, 3),
        )
        for row in figures
    ]
    print_table(STORE_COLUMNS, rows, text=("store",))


def _openings(openings: "list[Opening]") -> None:
    rows = [
        (
            row.commits,
            round(row.first_s, 3),
            round(row.next_s, 3),
            round(row.open_s, 3),
            round(row.open_mb, 1),
            round(row.snapshot_mb, 2),
        )
        for row in openings
    ]
    print_table(OPEN_COLUMNS, rows)
