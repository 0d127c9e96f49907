"""Drift: how far the student has moved from the policies that sampled what it trains on.

With d = log s(y) - log b(y) on sampled tokens y (s the student now, b the behaviour policy) and r =
exp(d):

    k3  = mean(r - 1 - d), an unbiased estimate of KL(b, s), never negative ESS = (sum r)^2 / (n sum
    r^2), the share of samples that importance weighting would leave; 1 without drift
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError
from stillroom.cache.storage import Storage

MAX_LOG_RATIO = 20.0
VERSION = re.compile(r"-1|0|[1-9][0-9]{0,9}")
MAX_VERSION = 2**31 - 1
ROUNDING = 1e-6
"""Relative, of sums; far more than float64 loses over any run."""
WHERE, DO = "drift in a checkpoint", "Delete the checkpoint to resume from an older one."


@dataclass(slots=True)
class Sums:
    """Sums over the sampled tokens of one policy version."""

    n: int = 0
    log_ratio: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0

    def add(self, log_ratio: np.ndarray) -> None:
        """Add tokens' d, in nats."""
        clipped = np.clip(log_ratio.astype(np.float64), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = np.exp(clipped)
        self.n += len(clipped)
        self.log_ratio += float(clipped.sum())
        self.ratio += float(ratio.sum())
        self.ratio_squared += float((ratio**2).sum())

    def summary(self) -> dict[str, float]:
        """k3 in nats, ESS in (0, 1], and n."""
        return {
            "positions": self.n,
            "k3_nats": (self.ratio - self.log_ratio) / self.n - 1,
            "ess": self.ratio**2 / (self.n * self.ratio_squared),
        }


@dataclass(slots=True)
class DriftMeter:
    """Drift by policy version, since the last record."""

    policy_version: int
    """The policy that is being trained from; lag is counted from it."""
    by_policy: dict[int, Sums] = field(default_factory=dict)

    def add(
        self, student_logprob: np.ndarray, behaviour_logprob: np.ndarray, policy_version: np.ndarray
    ) -> None:
        """Add sampled tokens; those whose behaviour logprob is unknown are left out.

        Args:
            student_logprob: (P,) nats, at the temperature of the sampling.
            behaviour_logprob: (P,) nats; NaN where unknown.
            policy_version: (P,) int.
        """
        log_ratio = student_logprob - behaviour_logprob
        for version in np.unique(policy_version):
            chosen = log_ratio[(policy_version == version) & ~np.isnan(log_ratio)]
            if len(chosen):
                self.by_policy.setdefault(int(version), Sums()).add(chosen)

    def merge(self, by_rank: Sequence[Mapping[int, Sums]]) -> None:
        """Replace the sums by those of all ranks together."""
        total: dict[int, Sums] = {}
        for version, sums in (item for part in by_rank for item in part.items()):
            have = total.get(version, Sums())
            pairs = ((getattr(have, f.name), getattr(sums, f.name)) for f in fields(Sums))
            total[version] = Sums(*(mine + theirs for mine, theirs in pairs))
        self.by_policy = total

    def state(self) -> dict[str, dict[str, float]]:
        """Plain values, for a checkpoint."""
        return {str(version): asdict(sums) for version, sums in self.by_policy.items()}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave.

        Raises:
            CorruptError: these are not sums by policy version.
        """
        self.by_policy = {_version(name): _sums(name, sums) for name, sums in state.items()}

    def take(self) -> dict[str, Any]:
        """Summary by policy version, with its lag in policies (None where the version is unknown);
        starts anew."""
        out = {
            str(version): {
                **sums.summary(),
                "lag": None if version < 0 else self.policy_version - version,
            }
            for version, sums in sorted(self.by_policy.items())
        }
        self.by_policy = {}
        return out


def _version(name: str) -> int:
    if VERSION.fullmatch(name) is None or int(name) > MAX_VERSION:
        raise CorruptError(WHERE, "a policy version", f"{name!r:.80}", DO)
    return int(name)


def _sums(name: str, value: Mapping[str, Any]) -> Sums:
    where = f"{WHERE}, policy {name}"
    sums: Sums = jsonfile.build(Sums, dict(value), where)
    if not _can_be(sums):
        raise CorruptError(where, "sums over some tokens", f"{sums}", DO)
    return sums


def _can_be(sums: Sums) -> bool:
    """Whether some tokens have these sums, up to rounding: each d is bounded, exp of the mean d is
    at most the mean ratio (Jensen), and its square at most the mean square (Cauchy-Schwarz)."""
    n, up, down = sums.n, 1 + ROUNDING, 1 - ROUNDING
    if n < 1 or not abs(sums.log_ratio) <= up * n * MAX_LOG_RATIO:
        return False
    if not 0 <= sums.ratio_squared <= up * n * math.exp(2 * MAX_LOG_RATIO):
        return False
    least, most = math.exp(sums.log_ratio / n), math.sqrt(sums.ratio_squared / n)
    return down * least <= sums.ratio / n <= up * most


def put_drift(storage: Storage, run: str, step: int, drift: dict[str, Any]) -> None:
    """Leave a record in the cache; a rerun of the same step leaves the first one."""
    storage.put_new(
        f"drift/{run}/{step:08d}.json",
        jsonfile.dump_sealed({"run": run, "step": step, "by_policy": drift}),
    )
