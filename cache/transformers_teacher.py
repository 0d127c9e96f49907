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
from stillroom.cache.errors import InputError, NumericsError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.teacher import RowScores, ScoreRow, TeacherConfig


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

    def score(
        self, rows: Sequence[ScoreRow], topk: int, temperature: float
    ) -> Iterator[tuple[int, RowScores]]:
        """Score rows in batches of like length; see `teacher.Teacher`."""
        lengths = [len(row.token) for row in rows]
        too_long = [i for i, n in enumerate(lengths) if n > self._files.max_length]
        if too_long:
            got = f"{lengths[too_long[0]]} tokens"
            expected = f"at most the teacher's {self._files.max_length} tokens"
            raise InputError(f"row {too_long[0]}", expected, got, "Sample shorter completions.")
        for batch in length_batches(lengths, self._config.max_batch_tokens):
            scored = self._score_batch({i: rows[i] for i in batch}, topk, temperature)
            yield from zip(batch, scored, strict=True)

    @torch.inference_mode()
    def _score_batch(
        self, batch: dict[int, ScoreRow], topk: int, temperature: float
    ) -> list[RowScores]:
        rows = list(batch.values())
        hidden_PH = self._hidden([row.token for row in rows], [row.targets for row in rows])
        sampled = np.concatenate([row.token[row.targets] for row in rows]).astype(np.int64)
        row_P = np.repeat(list(batch), [len(row.targets) for row in rows])
        sampled_P = torch.from_numpy(sampled).to(self._device)
        chunks = []
        for start in range(0, len(sampled_P), self._config.head_rows):
            span = slice(start, start + self._config.head_rows)
            logit_PV = head_logits(self._model, hidden_PH[span]).float() / temperature
            logit_PV[:, self._files.vocab_size :] = -torch.inf
            chunks.append(summarise(logit_PV, sampled_P[span], topk, row_P[span]))
        joined = [torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True)]
        ends = np.cumsum([len(row.targets) for row in rows])
        parts = [np.split(column, ends[:-1]) for column in joined]
        return [_rounded(*row_parts) for row_parts in zip(*parts, strict=True)]

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


def summarise(
    logit_PV: torch.Tensor, sampled_P: torch.Tensor, topk: int, row_P: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k, tail and sampled logprobs of full rows of logits.

        logprob_v = z_v - logsumexp(z);  tail = logsumexp over the complement of the top k -
        logsumexp(z)

    Args:
        logit_PV: (P, V) float32; overwritten at the top k.
        sampled_P: (P,) int64 token ids.
        topk: K.
        row_P: (P,) which row each position is of, for messages.

    Returns:
        ids (P, K) int64, logprobs (P, K), tail (P,), sampled logprob (P,), all float32 nats.

    Raises:
        NumericsError: a position holds NaN or +inf, or nothing finite; names its row.
    """
    lse_P = torch.logsumexp(logit_PV, dim=-1)
    bad = (~torch.isfinite(lse_P)).nonzero()
    if len(bad):
        raise NumericsError(
            f"row {row_P[int(bad[0])]}",
            "finite teacher logits",
            f"a logsumexp of {lse_P[bad[0]].item()}",
            "Run the teacher in float32 or bfloat16, or check its weights.",
        )
    sampled = logit_PV.gather(1, sampled_P[:, None]).squeeze(1) - lse_P
    top_PK, id_PK = logit_PV.topk(topk, dim=-1)
    tail = torch.logsumexp(logit_PV.scatter_(1, id_PK, -torch.inf), dim=-1) - lse_P
    return id_PK, top_PK - lse_P[:, None], tail, sampled


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


def _rounded(
    ids: np.ndarray, logprob: np.ndarray, tail: np.ndarray, sampled: np.ndarray
) -> RowScores:
    """Round to storage precision and put entries into the format's order."""
    half = np.minimum(logprob, 0).astype(np.float16)
    order = np.lexsort((ids, -half.astype(np.float32)), axis=-1)
    return RowScores(
        topk_id=np.take_along_axis(ids, order, -1).astype(np.uint32),
        topk_logprob=np.take_along_axis(half, order, -1),
        tail_logprob=np.minimum(tail, 0).astype(np.float16),
        sampled_logprob=np.minimum(sampled, 0).astype(np.float32),
    )
