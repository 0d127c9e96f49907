"""What the vectorised code of parts does, row by row in plain Python; and any rollout, good or
bad."""

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from stillroom.cache.schema import FINISH_REASONS, SOURCES, UNUSED_ID
from tests.cache.fakes import VOCAB, make_rollout

TWIN_MAX_LENGTH = 12
TWIN_MAX_EXTRA = 2


def problem_of(item: dict[str, Any]) -> str | None:
    """The first thing that is wrong with a row."""
    prompt, completion = item["prompt"], item["completion"]
    if not prompt or not completion:
        return "an empty prompt" if not prompt else "an empty completion"
    tokens = [*prompt, *completion, *(item["teacher_prompt"] or [])]
    if None in tokens:
        return "a token without an id"
    if max(tokens) >= VOCAB:
        return f"token id {max(tokens)}, but the vocabulary has {VOCAB}"
    if item["finish_reason"] not in FINISH_REASONS:
        return f"finish_reason {item['finish_reason']!r}, which is none of {FINISH_REASONS}"
    if item["source"] not in SOURCES:
        return f"source {item['source']!r}, which is none of {SOURCES}"
    for name in ("scored", "behaviour_logprob", "x_weight"):
        if item[name] is not None and len(item[name]) != len(completion):
            return f"{len(item[name])} values of {name!r} for {len(completion)} completion tokens"
    if item["scored"] is not None and (not any(item["scored"]) or set(item["scored"]) - {0, 1}):
        return "a 'scored' mask with no 1, or with other values than 0 and 1"
    if any(v is not None and v > 0 for v in item["behaviour_logprob"] or []):
        return "a behaviour logprob above 0"
    if -np.inf in (item["behaviour_logprob"] or []):
        return "a behaviour logprob of -inf in float32; unknown is NaN or null"
    length = len(item["teacher_prompt"] or prompt) + len(completion)
    if length > TWIN_MAX_LENGTH:
        return f"{length} tokens; the teacher reads {TWIN_MAX_LENGTH}"
    return None


def extra_is_bad(item: dict[str, Any]) -> bool:
    """Whether the extra ids of an otherwise good row cannot be scored."""
    ids, logprobs = item["extra_id"], item["extra_behaviour_logprob"]
    if ids is None:
        return logprobs is not None
    if len(ids) != len(item["completion"]) or any(len(e or []) > TWIN_MAX_EXTRA for e in ids):
        return True
    if any(i is None or i >= VOCAB for entry in ids for i in entry or []):
        return True
    if logprobs is None:
        return False
    given = [v for e in logprobs for v in e or [] if v is not None]
    if len(logprobs) != len(ids) or any(v > 0 or v == -np.inf for v in given):
        return True
    return any(e and len(e) != len(i or []) for e, i in zip(logprobs, ids, strict=True))


def arrays_of_row(item: dict[str, Any], extra: int) -> dict[str, list[Any]]:
    """One row's share of the per-token and per-position columns."""
    n, width = len(item["completion"]), extra
    mask = item["scored"] or [1] * n
    kept = [i for i in range(n) if mask[i]]

    def chosen(values: list[Any] | None) -> list[float]:
        floats = [np.nan if v is None else v for v in values or [None] * n]
        return [float(np.float32(floats[i])) for i in kept]

    def padded(values: list[Any] | None, filler: Any) -> list[Any]:
        entries = [[filler if v is None else v for v in e or []] for e in values or [[]] * n]
        return [(entries[i] + [filler] * width)[:width] for i in kept]

    return {
        "token": item["prompt"] + item["completion"],
        "scored": [0] * len(item["prompt"]) + mask,
        "teacher_prompt": item["teacher_prompt"] or [],
        "behaviour_logprob": chosen(item["behaviour_logprob"]),
        "x_weight": chosen(item["x_weight"]),
        "x_reward": [np.nan if item["x_reward"] is None else item["x_reward"]],
        "extra_id": padded(item["extra_id"], UNUSED_ID),
        "extra_behaviour_logprob": padded(item["extra_behaviour_logprob"], np.nan),
    }


USER_TYPES = {"x_weight": pa.list_(pa.float32()), "x_reward": pa.float32()}


def rollouts(*, bad: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Any rollout that can be scored; or, with `bad`, one that often cannot."""
    return _rollouts(bad)


@st.composite
def _rollouts(draw: st.DrawFn, bad: bool) -> dict[str, Any]:
    def chance() -> bool:
        return bad and draw(st.integers(0, 11)) == 0

    ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)

    def tokens() -> list[int]:
        broken: list[Any] = [[], [None], [1, None, 2], [VOCAB], [0, 2**32 - 1]]
        return draw(st.sampled_from(broken)) if chance() else draw(ids)

    prompt, completion = tokens(), tokens()
    n = len(completion) + (1 if chance() else 0)

    def per_token(values: st.SearchStrategy[Any], broken: Any) -> list[Any] | None:
        good = draw(st.none() | st.lists(values, min_size=n, max_size=n))
        return [broken] * n if good is not None and chance() else good

    at_most_0 = st.floats(max_value=0, width=32, allow_infinity=bad)
    logprob = at_most_0 | st.just(float("nan")) | st.none()
    entries = st.none() | st.lists(st.integers(0, VOCAB - 1), max_size=TWIN_MAX_EXTRA)
    extra = per_token(entries, [VOCAB])
    value = -np.inf if chance() else -1.0
    beside = [None if e is None else [value] * len(e) for e in extra or []]
    mask = per_token(st.integers(0, 1), 2)
    keep_mask = mask is not None and (any(mask) or chance())
    return make_rollout(
        prompt=prompt,
        completion=completion,
        scored=mask if keep_mask else None,
        behaviour_logprob=per_token(logprob, 0.5),
        teacher_prompt=draw(st.none() | st.just([]) | ids) if not chance() else [VOCAB],
        finish_reason="tired" if chance() else draw(st.sampled_from(FINISH_REASONS)),
        source="me" if chance() else draw(st.sampled_from(SOURCES)),
        rollout_id=draw(st.integers(0, 2**64 - 1)),
        x_weight=per_token(st.floats(width=32) | st.none(), 1.0),
        x_reward=draw(st.none() | st.floats(width=32)),
        extra_id=extra,
        extra_behaviour_logprob=beside if extra is not None and draw(st.booleans()) else None,
    )
