"""What must hold between a teacher's scores and the tokens they are of: the check that nothing was
shifted, swapped or scored for other tokens."""

import numpy as np

from stillroom.cache.errors import CorruptError
from stillroom.cache.schema import UNUSED_ID, Arrays

HALF_ULP = 2**-11
MASS_SLACK = 0.01
LEAST_FLOAT16 = np.float32(np.finfo(np.float16).min)
BLOCK_ROWS = 65_536
SCORES = ("topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob")
EXTRA = ("extra_id", "extra_logprob")


def check_agreement(arrays: Arrays, part: str) -> None:
    """A sampled or extra token has the same logprob among the kept entries, or else none above the
    least of them; each row has mass 1.

    Args:
        arrays: the columns of a shard, or of some of its positions.
        part: for messages.

    Raises:
        CorruptError: scores do not belong to their tokens; names the position.
    """
    names = [*SCORES, *(name for name in EXTRA if name in arrays)]
    sampled_id = arrays["token"][arrays["scored"].astype(bool)]
    for start in range(0, len(sampled_id), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = {name: arrays[name][rows] for name in names}
        _check_block(block, sampled_id[rows], part, start)


def _check_block(block: Arrays, sampled_id: np.ndarray, part: str, start: int) -> None:
    top = block["topk_logprob"].astype(np.float32)
    sampled = block["sampled_logprob"]
    agrees, listed = _agrees(block, top, sampled_id, sampled)
    mass = np.exp(top).sum(1) + np.exp(block["tail_logprob"].astype(np.float32))
    # "not (good)", because NaN compares false
    wrong = ~(agrees & (np.abs(mass - 1) <= MASS_SLACK))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise _disagreement(
            f"{part}, position {start + at}",
            f"logprob {sampled[at]:.4f} for it in the top k too, and a mass of 1",
            f"{listed[at]:.4f} and {mass[at]:.4f}",
        )
    for column in range(block["extra_id"].shape[1] if "extra_id" in block else 0):
        extra_id = block["extra_id"][:, column]
        logprob = block["extra_logprob"][:, column].astype(np.float32)
        agrees, listed = _agrees(block, top, extra_id, logprob)
        wrong = ~(agrees | (extra_id == UNUSED_ID))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise _disagreement(
                f"{part}, position {start + at}, extra id {extra_id[at]}",
                f"logprob {logprob[at]:.4f} for it in the top k too, or none above the least",
                f"{listed[at]:.4f}",
            )


def _agrees(
    block: Arrays, top: np.ndarray, token_id: np.ndarray, logprob: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether logprobs (P,) of tokens (P,) fit the kept entries; and what stands there, or 0."""
    hit = block["topk_id"] == token_id[:, None]
    listed = np.maximum(np.where(hit, top, 0).sum(1, dtype=np.float32), LEAST_FLOAT16)
    last = block["topk_count"][:, None].astype(np.int64) - 1
    least = np.maximum(np.take_along_axis(top, last, 1)[:, 0], LEAST_FLOAT16)
    own = np.maximum(logprob, LEAST_FLOAT16)
    slack = HALF_ULP * np.maximum(1, -own) + 1e-4
    return np.where(hit.any(1), np.abs(listed - own) <= slack, own <= least + slack), listed


def _disagreement(where: str, expected: str, got: str) -> CorruptError:
    do = "The teacher answered for other tokens: report this engine."
    return CorruptError(where, expected, got, do)
