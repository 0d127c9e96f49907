"""`stillroom bench score`: what it costs this process to make scores of an engine's answer, without
the engine."""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from stillroom.cache.teacher import ScoreRow, ScoreSpec
from stillroom.cache.vllm_logprobs import TokenLogprobs, score_row

TOPK = 128
LENGTH = 512
ROWS = 16
VOCAB = 151_936
REPEATS = 5
GOAL_US = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontEnd:
    """Processor time of one process."""

    topk: int
    positions: int
    microseconds: float
    """A position, the median of the repeats."""
    least_us: float
    most_us: float


def measure_front_end(rows: int = ROWS) -> FrontEnd:
    """Make scores of made-up log probabilities, as vLLM's arrays come: in pieces, with the
    submitted token in front."""
    pairs = [_made_up(seed) for seed in range(rows)]
    spec, positions = ScoreSpec(topk=TOPK), sum(len(row.targets) for row, _, _ in pairs)
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        for row, ids, logprobs in pairs:
            answer = TokenLogprobs(np.concatenate(ids), np.concatenate(logprobs))
            score_row(answer, row, spec, "row")
        found.append((time.process_time() - start) / positions * 1e6)
    return FrontEnd(
        topk=TOPK,
        positions=positions,
        microseconds=median(found),
        least_us=min(found),
        most_us=max(found),
    )


def _made_up(seed: int) -> tuple[ScoreRow, list[np.ndarray], list[np.ndarray]]:
    """A row, and an engine's ids and logprobs of it in two pieces."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 3, (LENGTH - 1, TOPK)).astype(np.float32)
    logprob = np.sort(logit - np.log(1.05 * np.exp(logit).sum(1, keepdims=True)), axis=1)[:, ::-1]
    ids = np.stack([rng.choice(VOCAB, TOPK, replace=False) for _ in range(LENGTH - 1)])
    picked = np.minimum(rng.geometric(0.5, LENGTH - 1) - 1, TOPK - 1)[:, None]
    ids = np.concatenate([np.take_along_axis(ids, picked, 1), ids], axis=1).astype(np.int32)
    logprob = np.concatenate([np.take_along_axis(logprob, picked, 1), logprob], axis=1)
    token = np.concatenate([[0], ids[:, 0]]).astype(np.uint32)
    row = ScoreRow(token, np.arange(1, LENGTH))
    half = LENGTH // 2
    pieces = [np.ascontiguousarray(logprob[:half]), np.ascontiguousarray(logprob[half:])]
    return row, [ids[:half], ids[half:]], pieces
