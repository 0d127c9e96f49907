"""How many entries are kept of each position, what a cut by mass left out, and how much forward KL
the tail can hide.

Merging the tokens outside the kept entries into one tail hides, at a position (exactly),

    tail * KL(teacher within the tail || student within the tail)

of the forward KL. Without the student nothing bounds that: its probabilities there may be as near
to 0 as one likes. What can be said of the teacher alone is for a student that does no worse within
the tail than a uniform guess over its n = V - k tokens, cross-entropy at most log(n):

    hidden <= tail * (log(n) - entropy of the teacher within the tail)
           <= tail * (log(n) - max(0, log(tail / least)))

where least is the probability of the least likely kept entry. No token of the tail is likelier, so
none has more than least / tail of it, and the entropy is at least the logarithm of the inverse. For
a given student `train.hidden_kl.hidden_kl_bound` needs no assumption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

ENTRY_BYTES = 6
"""An id and a logprob, before compression."""


@dataclass(slots=True)
class Kept:
    """Sums over positions."""

    vocab_size: int
    entries: np.ndarray
    """(K + 1,) int64: positions by their number of entries."""
    hidden_nats: float = 0.0
    """Sum of the bounds on the forward KL that the tail hides from a student that is as good there
    as a uniform guess."""

    def add(self, count: np.ndarray, top: np.ndarray, tail: np.ndarray) -> None:
        """Add positions.

        Args:
            count: (P,) entries that are used.
            top: (P, K) float16, their logprobs, nats.
            tail: (P,) float16, nats.
        """
        self.entries += np.bincount(count, minlength=len(self.entries))
        self.hidden_nats += float(hidden_from_uniform(count, top, tail, self.vocab_size).sum())

    def as_json(self) -> dict[str, Any]:
        """Plain values; means are NaN where there is no position.

        What the entries left out would have cost once compressed is not said: those of peaked
        positions, which are cut most, cost less than the others, by a factor that depends on the
        teacher.
        """
        positions = int(self.entries.sum())
        mean = 1 / positions if positions else float("nan")
        used = int(self.entries @ np.arange(len(self.entries)))
        left_out = positions * (len(self.entries) - 1) - used
        return {
            "entries": {"mean": used * mean, **self._spread()},
            "entries_left_out": left_out,
            "left_out_share": left_out * mean / (len(self.entries) - 1),
            "left_out_raw_bytes_per_position": ENTRY_BYTES * left_out * mean,
            "mean_hidden_kl_bound_nats": self.hidden_nats * mean,
        }

    def _spread(self) -> dict[str, int]:
        until = self.entries.cumsum()
        shares = {"p50": 0.5, "p95": 0.95, "max": 1.0}
        return {name: int(np.searchsorted(until, q * until[-1])) for name, q in shares.items()}


def hidden_from_uniform(
    count: np.ndarray, top: np.ndarray, tail: np.ndarray, vocab_size: int
) -> np.ndarray:
    """The bound of this module's first paragraphs, to the rounding of what is stored.

    Args:
        count: (P,) entries that are used, at least 1.
        top: (P, K) their logprobs, nats.
        tail: (P,) nats; -inf where there is no tail.
        vocab_size: V.

    Returns:
        (P,) float64 nats; 0 where there is no tail.
    """
    bound = np.zeros(len(tail))
    (rows,) = np.nonzero(np.isfinite(tail))
    log_tail, used = tail[rows].astype(np.float64), count[rows].astype(np.int64)
    least = np.take_along_axis(top[rows], used[:, None] - 1, 1)[:, 0].astype(np.float64)
    entropy = np.maximum(log_tail - least, 0)
    uniform = np.log(np.maximum(vocab_size - used, 1))
    bound[rows] = np.exp(log_tail) * np.maximum(uniform - entropy, 0)
    return bound
