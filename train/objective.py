"""Which loss a student is trained on: a kind, its parameter, what goes with it. Needs no torch."""

import math
from dataclasses import dataclass

from stillroom.cache.schema import SOURCES
from stillroom.train.settings import check_setting, convert_fields

PARAMETERS = {"jsd": "beta", "skew": "alpha", "skew_reverse": "alpha", "mixed": "forward_weight"}
"""The setting that each kind of divergence takes; other kinds take none."""
DIVERGENCES = ("forward", "reverse", *PARAMETERS)
ESTIMATORS = (
    "reverse_kl_rb",
    "policy_gradient",
    "multi_sample_policy_gradient",
    "forward_kl_tail_samples",
)
KINDS = (*DIVERGENCES, *ESTIMATORS)
MODES = ("tail", "renorm", "zero_tail", "truncated")
COMPARED = {
    "zero_tail": "without a teacher's tail only forward KL is finite for every student",
    "truncated": "without the tail's term reverse KL is least for a student that has moved most of "
    "its mass off the cached tokens",
}
"""Modes that only forward KL takes, and why."""
IMPORTANCE = ("none", "full", "tis", "icepop")
WEIGHTED = ("reverse_kl_rb", "policy_gradient", "multi_sample_policy_gradient")
"""Kinds with a term that the importance weight multiplies."""
LIMITS = {"importance_cap": ("tis", 2.0), "importance_range": ("icepop", (0.5, 5.0))}
"""Which weights each limit is for, and its default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised at each scored position; docs/objectives.md has the formulas."""

    kind: str = "forward"
    """Divergence: forward (KL(teacher, student)), reverse, jsd, skew, skew_reverse or mixed; or
    estimator: reverse_kl_rb, policy_gradient, multi_sample_policy_gradient or
    forward_kl_tail_samples."""
    beta: float | None = None
    """For jsd: the teacher's weight in the mixture; between 0 and 1, both excluded."""
    alpha: float | None = None
    """For skew: the teacher's weight in the mixture, for skew_reverse the student's; between 0 and
    1, both excluded."""
    forward_weight: float | None = None
    """For mixed: the weight of forward KL, the rest being reverse KL's; 0 to 1."""
    mode: str = "tail"
    """What becomes of the mass outside the cached tokens: tail (a bucket of its own), renorm (both
    sides renormalised without it), zero_tail (the teacher has none), truncated (its term is left
    out). The last two drain the student's tail, and are there to compare with."""
    importance: str = "full"
    """Weight of sampled tokens in estimators, from the ratio r of student to sampling policy: none
    (1), full (r), tis (at most importance_cap), icepop (r inside importance_range, else 0)."""
    importance_cap: float = 2.0
    """For tis; > 0."""
    importance_range: tuple[float, float] = (0.5, 5.0)
    """For icepop: least and greatest ratio that counts; > 0."""
    clip_range: float | None = None
    """For policy gradients: the PPO clip epsilon, > 0; None clips nothing."""
    baseline: bool = False
    """For policy gradients: add the bucketed reverse KL to the advantage, which mostly lowers the
    variance and, with full weights, adds no bias."""
    cross_entropy: float = 0.0
    """Share of cross-entropy on the sampled token, the rest being the kind's loss, which 1 leaves
    out; 0 to 1. Its mean is over positions whose text is in cross_entropy_sources."""
    cross_entropy_sources: tuple[str, ...] = ("teacher", "dataset")
    """Sources of text that cross-entropy is taken on: unknown, student, teacher, dataset or import;
    on a student's own text it would only sharpen what the student says already."""

    @property
    def param(self) -> float | None:
        """The kind's parameter, None where it takes none."""
        name = PARAMETERS.get(self.kind)
        return None if name is None else getattr(self, name)

    def __post_init__(self) -> None:
        """Check types and ranges, and that nothing is set that the kind does not use."""
        convert_fields(self, "train")
        _one_of("kind", self.kind, KINDS)
        _one_of("mode", self.mode, MODES)
        _one_of("importance", self.importance, IMPORTANCE)
        self._check_parameters()
        self._check_mode()
        self._check_weights()
        self._check_policy_gradient()
        self._check_cross_entropy()

    def _check_parameters(self) -> None:
        for name in dict.fromkeys(PARAMETERS.values()):
            value, takers = getattr(self, name), [k for k, v in PARAMETERS.items() if v == name]
            if self.kind not in takers:
                expected = f"nothing, as {self.kind} takes none (only {' and '.join(takers)})"
                check_setting(f"train.{name}", value is None, expected, value)
            elif name == "forward_weight":
                valid = value is not None and 0 <= value <= 1
                check_setting(f"train.{name}", valid, "a weight from 0 to 1", value)
            else:
                valid = value is not None and 0 < value < 1
                expected = "a weight between 0 and 1, both excluded"
                check_setting(f"train.{name}", valid, expected, value)

    def _check_mode(self) -> None:
        plain = self.mode == "tail" or self.kind in DIVERGENCES
        check_setting("train.mode", plain, f"'tail', which {self.kind} is defined with", self.mode)
        if self.mode in COMPARED:
            expected = f"'tail' or 'renorm'; {COMPARED[self.mode]}"
            check_setting("train.mode", self.kind == "forward", expected, self.mode)

    def _check_weights(self) -> None:
        weighted, expected = self.kind in WEIGHTED, f"'full', the default: {self.kind} has none"
        valid = weighted or self.importance == "full"
        check_setting("train.importance", valid, expected, self.importance)
        cap, (low, high) = self.importance_cap, self.importance_range
        valid = cap > 0 and math.isfinite(cap)
        check_setting("train.importance_cap", valid, "a finite number above 0", cap)
        valid = 0 < low <= high < math.inf
        check_setting("train.importance_range", valid, "0 < least <= greatest", (low, high))
        for name, (weights, default) in LIMITS.items():
            value, expected = getattr(self, name), f"{default}, the default: only {weights} has it"
            valid = self.importance == weights or value == default
            check_setting(f"train.{name}", valid, expected, value)

    def _check_policy_gradient(self) -> None:
        gradient = self.kind in ("policy_gradient", "multi_sample_policy_gradient")
        clip, expected = self.clip_range, "nothing: weights of 1 are never clipped"
        valid = clip is None or self.importance != "none"
        check_setting("train.clip_range", valid, expected, clip)
        expected = "nothing: only policy gradients are clipped"
        check_setting("train.clip_range", clip is None or gradient, expected, clip)
        valid = clip is None or 0 < clip < 1
        check_setting("train.clip_range", valid, "between 0 and 1", clip)
        reached = clip is None or self.importance != "tis" or self.importance_cap > 1 + clip
        expected = f"below {self.importance_cap} - 1: weights are cut before they are clipped"
        check_setting("train.clip_range", reached, expected, clip)
        expected = "false: only policy gradients have an advantage"
        check_setting("train.baseline", gradient or not self.baseline, expected, self.baseline)

    def _check_cross_entropy(self) -> None:
        share, sources = self.cross_entropy, self.cross_entropy_sources
        check_setting("train.cross_entropy", 0 <= share <= 1, "a share from 0 to 1", share)
        name = "train.cross_entropy_sources"
        check_setting(name, set(sources) <= set(SOURCES), f"some of {SOURCES}", sources)
        expected = "one source at least, as train.cross_entropy is above 0"
        check_setting(name, bool(sources) or not share, expected, sources)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    check_setting(f"train.{name}", value in known, f"one of {known}", value)
