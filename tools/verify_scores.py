"""What the numbers of a shard's positions must satisfy, whoever scored them."""

import numpy as np

from stillroom.cache.agreement import EXTRA, SCORES, check_agreement
from stillroom.cache.check_arrays import check_entries
from stillroom.cache.errors import CorruptError
from stillroom.cache.identity import Identity
from stillroom.cache.schema import UNUSED_ID, Arrays

ROUNDING = 2**-11
MASS_SLACK = 1e-4
DRAW_LOGPROBS = ("extra_behaviour_logprob", "extra_logprob")


def score_names(identity: Identity) -> list[str]:
    """The columns that `check_scores` needs, beside `token` and `scored`."""
    if not identity.extra:
        return list(SCORES)
    return [*SCORES, *EXTRA, "extra_behaviour_logprob"]


def check_scores(arrays: Arrays, identity: Identity, where: str) -> None:
    """Check some positions of a shard.

    Args:
        arrays: their columns, those of `score_names` and the ids that were scored.
        identity: of the cache.
        where: which positions, for messages.

    Raises:
        CorruptError: a rule is broken; says which, and at how many positions.
        ShapeError: entries are used beyond their count.
    """
    check_entries(arrays, identity.topk, identity.extra)
    _check_ids(arrays, identity.vocab_size, where)
    names = ("topk_logprob", "tail_logprob", "sampled_logprob", "extra_logprob")
    for name in (n for n in names if n in arrays):
        above = int((~(arrays[name] <= 0)).sum())
        _require(above == 0, where, f"{name} of at most 0", f"{above} that are not")
    _check_order(arrays, where)
    _check_cut(arrays, identity.mass, where)
    check_agreement(arrays, where)
    if identity.extra_kind == "tail":
        _check_draws(arrays, where)


def _check_ids(arrays: Arrays, vocab_size: int, where: str) -> None:
    for name in (n for n in ("topk_id", "extra_id") if n in arrays):
        ids = arrays[name]
        largest = int(ids[ids != UNUSED_ID].max(initial=0))
        _require(largest < vocab_size, where, f"{name} below {vocab_size}", f"{largest}")
    ordered = np.sort(arrays["topk_id"], axis=1)
    same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != UNUSED_ID)
    twice = int(same.any(axis=1).sum())
    _require(twice == 0, where, "every top-k id once", f"{twice} positions with one twice")


def _check_order(arrays: Arrays, where: str) -> None:
    ids, top = arrays["topk_id"], arrays["topk_logprob"].astype(np.float32)
    equal = (top[:, 1:] == top[:, :-1]) & (ids[:, 1:] > ids[:, :-1])
    falling = (top[:, 1:] < top[:, :-1]) | equal | (ids[:, 1:] == UNUSED_ID)
    unsorted = int((~falling).any(axis=1).sum())
    _require(unsorted == 0, where, "entries sorted by logprob, then id", f"{unsorted} that are not")


def _check_cut(arrays: Arrays, mass: float, where: str) -> None:
    """No more entries than cover the mass, and no fewer unless there are K; to rounding."""
    top, count = arrays["topk_logprob"].astype(np.float64), arrays["topk_count"].astype(np.int64)
    topk = top.shape[1]
    if mass == 1:
        fewer = int((count < topk).sum())
        _require(fewer == 0, where, f"{topk} entries each", f"{fewer} positions with fewer")
        return
    probability = np.exp(top)
    covered = probability.sum(1)
    blur = ROUNDING * (probability * -np.where(probability > 0, top, 0)).sum(1) + MASS_SLACK
    last = np.take_along_axis(probability, count[:, None] - 1, 1)[:, 0]
    short = int(((covered + blur < mass) & (count < topk)).sum())
    _require(short == 0, where, f"entries that cover {mass}", f"{short} positions with fewer")
    idle = int((covered - last - blur >= mass).sum())
    _require(idle == 0, where, f"no entry beyond {mass}", f"{idle} positions with more")


def _check_draws(arrays: Arrays, where: str) -> None:
    drawn = arrays["extra_id"]
    partly = int(((drawn == UNUSED_ID) != (drawn[:, :1] == UNUSED_ID)).any(axis=1).sum())
    _require(partly == 0, where, "all draws from a tail or none", f"{partly} positions with some")
    kept = sum(
        int(((arrays["topk_id"] == ids[:, None]) & (ids[:, None] != UNUSED_ID)).any(1).sum())
        for ids in drawn.T
    )
    _require(kept == 0, where, "draws from outside the kept entries", f"{kept} from inside")
    rows, columns = np.nonzero((drawn != UNUSED_ID) & np.isfinite(arrays["extra_logprob"]))
    given, full = (arrays[n][rows, columns].astype(np.float64) for n in DRAW_LOGPROBS)
    tail = arrays["tail_logprob"][rows].astype(np.float64)
    slack = ROUNDING * (np.abs(full) + np.abs(tail)) + 0.01
    wrong = int((~(np.abs(given + tail - full) <= slack)).sum())
    _require(wrong == 0, where, "draws with their probability within the tail", f"{wrong} without")


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise CorruptError(where, expected, got, "Score the part again.")
