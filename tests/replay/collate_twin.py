"""What `collate` should give, token by token and position by position in plain Python."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import numpy as np

from stillroom.replay.batch import LAYOUT, UNUSED, MicroBatch, Row, collate

COPIED = ("tail_logprob", "sampled_logprob", "behaviour_logprob")


def assert_collated(given: Sequence[Row], plain: Sequence[Row], groups: list[int] | None) -> None:
    """Rows collate to what the twin makes of the same rows without facts, to the bit."""
    found, expected = collate(given, groups=groups), twin(plain, groups)
    for field in fields(MicroBatch):
        array = getattr(found, field.name)
        assert array.dtype == expected[field.name].dtype, field.name
        assert array.shape == expected[field.name].shape, field.name
        assert array.tobytes() == expected[field.name].tobytes(), field.name


def twin(rows: Sequence[Row], groups: list[int] | None) -> dict[str, np.ndarray]:
    """Arrays of a micro-batch."""
    out: dict[str, list[Any]] = {name: [] for name in LAYOUT}
    numbers = list(range(len(rows))) if groups is None else groups
    for _, run in groupby(zip(numbers, rows, strict=True), key=lambda pair: pair[0]):
        _lay_down([row for _, row in run], out)
    out["row_start"].append(len(out["token"]))
    for row in rows:
        _score(row, out)
    arrays: dict[str, np.ndarray] = {}
    for name, (axes, dtype) in LAYOUT.items():
        if len(axes) == 1:
            arrays[name] = np.array(out[name], dtype)
            continue
        width = max(row.arrays[name].shape[1] if name in row.arrays else 0 for row in rows)
        arrays[name] = np.full((len(out[name]), width), UNUSED[name], dtype)
        for at, entries in enumerate(out[name]):
            arrays[name][at, : len(entries)] = entries
    return arrays


def _lay_down(rows: list[Row], out: dict[str, list[Any]]) -> None:
    """Tokens of rows of one group, and what the tokens before each scored one are."""
    shortest = min(len(row.arrays["token"]) for row in rows)
    shared = min(int(rows[0].arrays["prompt_length"][0]), shortest) if len(rows) > 1 else 0
    prefix, begin = len(out["row_start"]) if shared else -1, len(out["token"])
    if shared:
        _segment(rows[0].arrays["token"][:shared], 0, -1, out)
    for row in rows:
        start = len(out["token"])
        _segment(row.arrays["token"][shared:], shared, prefix, out)
        for at in range(len(row.arrays["token"])):
            if row.arrays["scored"][at]:
                before = at - 1
                place = begin + before if before < shared else start + before - shared
                out["predict_index"].append(place)
                out["sampled_id"].append(row.arrays["token"][at])


def _segment(tokens: np.ndarray, first: int, prefix: int, out: dict[str, list[Any]]) -> None:
    out["row_start"].append(len(out["token"]))
    out["prefix"].append(prefix)
    for at, token in enumerate(tokens):
        out["token"].append(token)
        out["position_id"].append(first + at)


def _score(row: Row, out: dict[str, list[Any]]) -> None:
    arrays = row.arrays
    for at in range(len(arrays["tail_logprob"])):
        weight = arrays.get("weight", np.ones(1))
        out["weight"].append(weight[at if len(weight) > 1 else 0])
        out["policy_version"].append(arrays["policy_version_min"][0])
        out["source"].append(arrays["source"][0])
        out["sampling_temperature"].append(row.sampling_temperature)
        out["row"].append(row.number)
        out["cache"].append(row.cache)
        out["extra_likeliest"].append(row.extra_likeliest)
        for name in COPIED:
            out[name].append(arrays[name][at])
        for name in UNUSED:
            out[name].append(arrays[name][at].astype(LAYOUT[name][1]) if name in arrays else [])
