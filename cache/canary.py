"""The canary: fixed sequences that show whether a teacher still computes what the cache holds.

One file per numeric class (engine, version, dtype, device). In the same class the scores must agree
closely; a new class must agree with the first one within what another dtype costs, and a person
must have confirmed it.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from stillroom.cache import jsonfile
from stillroom.cache.errors import CorruptError, MismatchError
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, Teacher

LENGTHS = (2, 4, 8, 16, 32, 64, 96, 128)
KEPT = 16
MAX_BYTES = 4 << 20
SAME_CLASS = (0.01, 3e-4)
NEW_CLASS = (0.06, 3e-3)
CHECK_EVERY_S = 3600.0
"""A teacher that stays in memory scores the canary again after so long."""
LEAST = float(np.finfo(np.float16).min)
"""Of a stored logprob, nats."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two scorings of the canary are apart."""

    sampled_nats: float
    """Mean absolute difference of the fixed tokens' logprobs."""
    kl_nats: float
    """Mean KL(first, second) over the kept entries and the rest."""

    def within(self, limits: tuple[float, float]) -> bool:
        """Whether both figures are at most the limits."""
        return self.sampled_nats <= limits[0] and self.kl_nats <= limits[1]


def check_canary(
    cache: Cache, teacher: Teacher, *, accept_numerics: bool = False
) -> Difference | None:
    """Compare a teacher with the cache's canary; the first teacher of a cache lays it down.

    Args:
        cache: the cache about to be filled.
        teacher: the teacher about to fill it.
        accept_numerics: a person confirmed a numeric class that the cache has not seen.

    Returns:
        The difference, or None if this teacher laid the canary down.

    Raises:
        MismatchError: the scores differ by more than rounding, or the class is new and not
            confirmed.
    """
    path = f"canary/{_slug(teacher.numeric_class)}.json"
    known = [entry.path for entry in cache.storage.list("canary")]
    scores = _score(cache, teacher)
    if path in known:
        return _compare(cache, path, scores, SAME_CLASS, teacher)
    difference = None
    if known:
        difference = _compare(cache, _first(cache, known), scores, NEW_CLASS, teacher)
        if not accept_numerics:
            raise MismatchError(
                cache.storage.describe(path),
                f"a numeric class that the cache knows ({', '.join(known)})",
                f"{teacher.numeric_class}, {difference.sampled_nats:.2g} nats apart",
                "If this engine may fill the cache too, confirm it with --accept-numerics.",
            )
    if not cache.storage.put_new(path, jsonfile.dump_sealed({**scores, "order": len(known)})):
        return _compare(cache, path, scores, SAME_CLASS, teacher)
    return difference


class CanaryCheck:
    """The canary of a teacher that stays in memory: scored at the first call, and again once
    `CHECK_EVERY_S` have passed.

    Args:
        cache: the cache that it fills.
        teacher: the teacher.
        accept_numerics: a person confirmed a numeric class that the cache has not seen.
    """

    def __init__(self, cache: Cache, teacher: Teacher, accept_numerics: bool = False) -> None:
        """Nothing is scored yet."""
        self._cache, self._teacher, self._accept = cache, teacher, accept_numerics
        self._checked_at = -float("inf")

    def if_due(self) -> None:
        """Compare the teacher with the canary, if it is time.

        Raises:
            MismatchError: as `check_canary`.
        """
        now = time.monotonic()
        if now - self._checked_at >= CHECK_EVERY_S:
            check_canary(self._cache, self._teacher, accept_numerics=self._accept)
            self._checked_at = now


def canary_rows(vocab_size: int, max_length: int) -> list[ScoreRow]:
    """Pseudo-random sequences, the same for a vocabulary; all but the first token are scored."""
    rows = []
    for length in (min(n, max_length) for n in LENGTHS):
        ids = [
            xxhash.xxh3_64_intdigest(f"canary/{length}/{i}".encode()) % vocab_size
            for i in range(length)
        ]
        rows.append(ScoreRow(np.array(ids, np.uint32), np.arange(1, length)))
    return rows


def read_canary(cache: Cache, path: str) -> dict[str, Any]:
    """A stored canary: `topk_id` and `topk_logprob`, a list of the leading entries a scored token,
    `sampled_logprob`, a number each, and `order`, the number of canaries before it.

    Raises:
        MissingError: it is not there.
        CorruptError: it does not hold scores of this cache's canary.
    """
    where = cache.storage.describe(path)
    value = jsonfile.load_sealed(cache.storage.get(path, MAX_BYTES), where)
    try:
        problem = _problem(cache, value)
    except (KeyError, ValueError, TypeError) as error:
        problem = repr(error)
    if problem:
        raise CorruptError(where, "scores of the canary", f"{problem:.200}", "Restore the file.")
    return value


def _problem(cache: Cache, value: dict[str, Any]) -> str:
    """What is wrong with a stored canary; empty if nothing is."""
    if value.keys() != {"topk_id", "topk_logprob", "sampled_logprob", "order"}:
        return f"the fields {sorted(value)}"
    if type(value["order"]) is not int:
        return f"order {value['order']!r}"
    identity = cache.identity
    rows = canary_rows(identity.vocab_size, identity.max_length)
    shape = (sum(len(row.targets) for row in rows), min(KEPT, identity.topk))
    ids = np.array(value["topk_id"])
    logprob, sampled = (np.array(value[n]) for n in ("topk_logprob", "sampled_logprob"))
    shapes = (ids.shape, logprob.shape, sampled.shape)
    if shapes != (shape, shape, shape[:1]):
        return f"scores of the shapes {shapes}"
    if ids.dtype.kind != "i" or not 0 <= ids.min() <= ids.max() < identity.vocab_size:
        return "ids that the vocabulary has not"
    if any(x.dtype.kind not in "fi" or x.max() > 0 or x.min() < LEAST for x in (logprob, sampled)):
        return f"logprobs that are not from {LEAST} to 0"
    return ""


def _score(cache: Cache, teacher: Teacher) -> dict[str, Any]:
    identity = cache.identity
    rows = canary_rows(identity.vocab_size, identity.max_length)
    spec = ScoreSpec(topk=identity.topk, temperature=identity.temperature)
    found = dict(teacher.score(rows, spec))
    return canary_scores([found[i] for i in range(len(rows))])


def canary_scores(ordered: Sequence[RowScores]) -> dict[str, Any]:
    """What is kept of the scores of `canary_rows`: leading entries and the fixed tokens' logprobs,
    as JSON has them."""
    kept = min(KEPT, ordered[0].topk_id.shape[1])
    return {
        "topk_id": np.concatenate([s.topk_id[:, :kept] for s in ordered]).tolist(),
        "topk_logprob": _finite([s.topk_logprob[:, :kept] for s in ordered]),
        "sampled_logprob": _finite([s.sampled_logprob for s in ordered]),
    }


def _finite(parts: list[np.ndarray]) -> list[Any]:
    """As JSON numbers, which know no infinity: at low temperatures logprobs leave float16."""
    joined = np.concatenate(parts).astype(np.float64)
    return list(np.maximum(joined, LEAST).tolist())


def _compare(
    cache: Cache, path: str, scores: dict[str, Any], limits: tuple[float, float], teacher: Teacher
) -> Difference:
    where = cache.storage.describe(path)
    difference = canary_difference(read_canary(cache, path), scores)
    if not difference.within(limits):
        raise MismatchError(
            where,
            f"logprobs within {limits[0]} nats and KL within {limits[1]} of the cache's",
            f"{difference.sampled_nats:.3g} nats and KL {difference.kl_nats:.3g}"
            f" from {teacher.numeric_class}",
            "The teacher does not compute what the cache holds: check its weights and settings,"
            " or use a new root.",
        )
    return difference


def canary_difference(first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """How far apart two results of `canary_scores` are, with equal numbers of entries."""
    sampled = np.abs(np.subtract(first["sampled_logprob"], second["sampled_logprob"]))
    kl = [
        _kl(dict(zip(i1, l1, strict=True)), dict(zip(i2, l2, strict=True)))
        for i1, l1, i2, l2 in zip(
            first["topk_id"],
            first["topk_logprob"],
            second["topk_id"],
            second["topk_logprob"],
            strict=True,
        )
    ]
    return Difference(float(sampled.mean()), float(np.mean(kl)))


def _kl(first: dict[int, float], second: dict[int, float]) -> float:
    """KL over the ids that both kept, and one bucket for all else."""
    common = sorted(first.keys() & second.keys())
    log_p = np.array([first[i] for i in common])
    log_q = np.array([second[i] for i in common])
    p, q = np.exp(log_p), np.exp(log_q)
    p_rest, q_rest = max(1 - p.sum(), 1e-6), max(1 - q.sum(), 1e-6)
    kept = (p[p > 0] * (log_p - log_q)[p > 0]).sum()
    return float(kept + p_rest * np.log(p_rest / q_rest))


def _first(cache: Cache, paths: list[str]) -> str:
    orders = {path: read_canary(cache, path)["order"] for path in paths}
    return min(paths, key=lambda p: (orders[p], p))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
