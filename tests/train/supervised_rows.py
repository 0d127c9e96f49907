"""A made-up dataset to fine-tune on, without any tokenizer."""

import numpy as np

from stillroom.train.supervised_data import SupervisedConfig, SupervisedRows

COUNT = 23
CONFIG = SupervisedConfig(source="made.jsonl", max_length=12, max_tokens=30, batch_rows=5, seed=4)


def made_rows(count: int = COUNT, seed: int = 0) -> SupervisedRows:
    """Rows of 2 to 12 tokens, of which the first and some others are not learned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 13, count)
    start = np.cumsum([0, *lengths])
    scored = rng.random(start[-1]) < 0.6
    scored[start[:-1]] = False
    scored[start[1:] - 1] = True
    positions = np.add.reduceat(scored.astype(int), start[:-1])
    token = rng.integers(0, 1000, start[-1]).astype(np.uint32)
    return SupervisedRows(token, scored, start, positions, {}, 0)
