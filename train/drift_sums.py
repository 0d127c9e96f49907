"""Sums over scored tokens, from which every measure of drift follows, and which add up over steps
and ranks.

With d = log s(y) - log b(y) on sampled tokens y (s the student now, b the behaviour policy) and r =
exp(d), d within 20 nats:

    k1 = mean(-d)               an estimate of KL(b, s), signed and noisy
    k3 = mean(r - 1 - d)        the same, unbiased, never negative
    reverse = mean(r d - r + 1) of KL(s, b), never negative
    chi_square = mean(r^2) - 1  second moment of the weights
    m2 = mean(d^2)              which signs do not cancel in
    ess = (sum r)^2 / (n sum r^2)   share of samples that importance weighting would leave; 1
                                without drift. Of rows: the same with each row's exp(mean d)
    coverage: the student's mean mass outside the cached tokens, the teacher's outside its kept
                                entries, and how often the sampled token was none of those
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from stillroom.train.callbacks import MicroOutcome

MAX_LOG_RATIO = 20.0
ROUNDING = 1e-6
"""Relative, of sums; far more than float64 loses over any run."""
RATIO_MEASURES = ("k1_nats", "k3_nats", "reverse_nats", "chi_square", "m2", "ess", "row_ess")


@dataclass(slots=True)
class Sums:
    """Sums over the scored tokens of one policy version."""

    positions: int = 0
    student_tail: float = 0.0
    teacher_tail: float = 0.0
    outside: int = 0
    n: int = 0
    """Positions whose behaviour logprob is known: those that the following are of."""
    log_ratio: float = 0.0
    log_ratio_squared: float = 0.0
    ratio: float = 0.0
    ratio_log_ratio: float = 0.0
    ratio_squared: float = 0.0
    rows: int = 0
    """Rows with such positions."""
    row_ratio: float = 0.0
    row_ratio_squared: float = 0.0

    def add(self, outcome: MicroOutcome, chosen: np.ndarray) -> None:
        """Add the chosen positions (P,) of a micro-batch; a row is in one micro-batch, whole."""
        micro = outcome.micro
        self.positions += int(chosen.sum())
        self.student_tail += _mass(outcome.student_tail_logprob[chosen])
        self.teacher_tail += _mass(micro.tail_logprob[chosen])
        self.outside += int((~outcome.in_topk[chosen]).sum())
        log_ratio = (outcome.student_logprob - outcome.behaviour_logprob)[chosen].astype(np.float64)
        known = ~np.isnan(log_ratio)
        if known.any():
            d = np.clip(log_ratio[known], -MAX_LOG_RATIO, MAX_LOG_RATIO)
            row = micro.row << 16 | micro.cache
            self._add_ratios(d, row[chosen][known])

    def _add_ratios(self, d: np.ndarray, row: np.ndarray) -> None:
        ratio = np.exp(d)
        self.n += len(d)
        self.log_ratio += float(d.sum())
        self.log_ratio_squared += float((d**2).sum())
        self.ratio += float(ratio.sum())
        self.ratio_log_ratio += float((ratio * d).sum())
        self.ratio_squared += float((ratio**2).sum())
        _, of_row, counts = np.unique(row, return_inverse=True, return_counts=True)
        row_ratio = np.exp(np.bincount(of_row, d) / counts)
        self.rows += len(counts)
        self.row_ratio += float(row_ratio.sum())
        self.row_ratio_squared += float((row_ratio**2).sum())

    def summary(self) -> dict[str, float | int | None]:
        """The measures of the module's page, in nats or in [0, 1]; those of d are None where no
        behaviour logprob is known."""
        found: dict[str, float | int | None] = {
            "positions": self.positions,
            "student_tail_mass": self.student_tail / self.positions,
            "teacher_tail_mass": self.teacher_tail / self.positions,
            "outside_topk": self.outside / self.positions,
            "compared": self.n,
        }
        if not self.n:
            return found | dict.fromkeys(RATIO_MEASURES)
        mean, ratio = self.log_ratio / self.n, self.ratio / self.n
        row_ess = self.row_ratio**2 / (self.rows * self.row_ratio_squared)
        values = (
            -mean,
            ratio - 1 - mean,
            self.ratio_log_ratio / self.n - ratio + 1,
            self.ratio_squared / self.n - 1,
            self.log_ratio_squared / self.n,
            self.ratio**2 / (self.n * self.ratio_squared),
            row_ess,
        )
        return found | dict(zip(RATIO_MEASURES, values, strict=True))


def _mass(logprob: np.ndarray) -> float:
    return float(np.exp(logprob.astype(np.float64)).sum())


def can_be(sums: Sums) -> bool:
    """Whether some tokens have these sums, up to rounding: what a checkpoint says is checked."""
    n, positions, most = sums.n, sums.positions, 1 + ROUNDING
    if not (positions >= 1 and 0 <= sums.outside <= positions and 0 <= n <= positions):
        return False
    if not all(0 <= mass <= most * positions for mass in (sums.student_tail, sums.teacher_tail)):
        return False
    if n == 0:
        return not any(getattr(sums, f.name) for f in fields(Sums)[5:])
    return (
        _log_ratios_can_be(sums)
        and 1 <= sums.rows <= n
        and _ratios_can_be(sums.rows, sums.row_ratio, sums.row_ratio_squared)
    )


def _log_ratios_can_be(sums: Sums) -> bool:
    """Each d is bounded, its square at least the mean's (Cauchy-Schwarz); exp of the mean d is at
    most the mean ratio, and r log r at least that of the mean r (Jensen)."""
    n, up = sums.n, 1 + ROUNDING
    if not abs(sums.log_ratio) <= up * n * MAX_LOG_RATIO:
        return False
    mean, square = sums.log_ratio / n, sums.log_ratio_squared / n
    if not (mean**2 <= up * square + ROUNDING**2 and square <= up * MAX_LOG_RATIO**2):
        return False
    if not _ratios_can_be(n, sums.ratio, sums.ratio_squared):
        return False
    ratio, product = sums.ratio / n, sums.ratio_log_ratio / n
    slack = ROUNDING * (1 + ratio * MAX_LOG_RATIO)
    least = ratio * math.log(ratio)
    return (1 - ROUNDING) * math.exp(mean) <= ratio and (
        least - slack <= product <= ratio * MAX_LOG_RATIO + slack
    )


def _ratios_can_be(n: int, ratio: float, squared: float) -> bool:
    """Each ratio is bounded, and the mean's square at most the mean square (Cauchy-Schwarz)."""
    up, bound = 1 + ROUNDING, math.exp(MAX_LOG_RATIO)
    return (
        n / bound <= up * ratio <= up * up * n * bound
        and 0 <= squared <= up * n * bound**2
        and ratio / n <= up * math.sqrt(squared / n)
    )
