"""The teacher run by transformers: exact float32 log probabilities and tails, in bounded memory.

Rows of like length share a forward, padded on the right, where causal attention cannot see. Hidden
states come first; the head is applied to `head_rows` scored positions at a time.

Shapes: B rows, T tokens, P scored positions, H hidden, V logit width, K entries.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import transformers

from stillroom.cache.causal_lm import head_logits, load_causal_lm, pick_device, trunk
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.summarise import rounded, summarise
from stillroom.cache.tail_draws import uniforms
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig


class TransformersTeacher:
    """A teacher model in this process.

    Args:
        files: its inspected folder.
        config: how it runs.
    """

    def __init__(self, files: ModelFiles, config: TeacherConfig) -> None:
        """Load the model."""
        self._files = files
        self._config = config
        self._device = pick_device(config.device)
        self._model = load_causal_lm(files, config.dtype, self._device)

    @property
    def numeric_class(self) -> str:
        """Engine, version, dtype and device."""
        return f"transformers-{transformers.__version__}-{self._config.dtype}-{self._device.type}"

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows in batches of like length; see `teacher.Teacher`."""
        lengths = [len(row.token) for row in rows]
        too_long = [i for i, n in enumerate(lengths) if n > self._files.max_length]
        if too_long:
            got = f"{lengths[too_long[0]]} tokens"
            expected = f"at most the teacher's {self._files.max_length} tokens"
            raise InputError(f"row {too_long[0]}", expected, got, "Sample shorter completions.")
        for batch in length_batches(lengths, self._config.max_batch_tokens):
            scored = self._score_batch({i: rows[i] for i in batch}, spec)
            yield from zip(batch, scored, strict=True)

    @torch.inference_mode()
    def _score_batch(self, batch: dict[int, ScoreRow], spec: ScoreSpec) -> list[RowScores]:
        rows = list(batch.values())
        hidden_PH = self._hidden([row.token for row in rows], [row.targets for row in rows])
        sampled = np.concatenate([row.token[row.targets] for row in rows]).astype(np.int64)
        row_P = np.repeat(list(batch), [len(row.targets) for row in rows])
        sampled_P = torch.from_numpy(sampled).to(self._device)
        extra = {
            name: torch.from_numpy(array).to(self._device)
            for name, array in _extra_inputs(rows, spec).items()
        }
        chunks = []
        for start in range(0, len(sampled_P), self._config.head_rows):
            span = slice(start, start + self._config.head_rows)
            logit_PV = head_logits(self._model, hidden_PH[span]).float() / spec.temperature
            logit_PV[:, self._files.vocab_size :] = -torch.inf
            own = {name: tensor[span] for name, tensor in extra.items()}
            chunks.append(summarise(logit_PV, sampled_P[span], spec, row_P[span], **own))
        joined = {n: torch.cat([c[n] for c in chunks]).cpu().numpy() for n in chunks[0]}
        edges = np.cumsum([0, *(len(row.targets) for row in rows)])
        return [
            rounded({name: column[edges[i] : edges[i + 1]] for name, column in joined.items()})
            for i in range(len(rows))
        ]

    def _hidden(self, tokens: list[np.ndarray], targets: list[np.ndarray]) -> torch.Tensor:
        """(P, H): the hidden state that predicts each target, which is the one before it."""
        input_BT = np.zeros((len(tokens), max(len(t) for t in tokens)), np.int64)
        for row, token in enumerate(tokens):
            input_BT[row, : len(token)] = token
        hidden_BTH = trunk(self._model, torch.from_numpy(input_BT).to(self._device))
        picked = [
            hidden_BTH[b, torch.from_numpy(t - 1).to(self._device)] for b, t in enumerate(targets)
        ]
        return torch.cat(picked)


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of like length, longest first, so that rows x longest <= max_tokens (a longer row
    goes alone)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _extra_inputs(rows: Sequence[ScoreRow], spec: ScoreSpec) -> dict[str, np.ndarray]:
    """What `summarise` needs for the extra ids of these rows, (P, M)."""
    if spec.extra_kind == "tail":
        drawn = [uniforms(row.seed, len(row.targets), spec.extra) for row in rows]
        return {"uniform_PM": np.concatenate(drawn)}
    if spec.extra_kind == "student":
        given = [row.extra_id for row in rows if row.extra_id is not None]
        return {"extra_id_PM": np.concatenate(given).astype(np.int64)}
    return {}
