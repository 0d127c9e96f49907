"""The teacher run by transformers: exact float32 log probabilities and tails, in bounded memory.

Rows of like length share a forward, padded on the right, where causal attention cannot see. Hidden
states come first; the head is applied to `head_rows` scored positions at a time.

Shapes: P scored positions, H hidden.
"""

from collections.abc import Iterator, Sequence

import torch
import transformers

from stillroom.cache.causal_lm import pick_device
from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.full_logits import load_logits
from stillroom.cache.hidden_scores import score_hidden
from stillroom.cache.id_map import IdMap
from stillroom.cache.mapped_logits import MappedLogits
from stillroom.cache.model_time import ModelTime
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig


class TransformersTeacher:
    """A teacher model in this process, or an ensemble of several.

    Args:
        files: its inspected folder, with those of an ensemble's other members.
        config: how it runs.
        id_map: from the ids of rows and scores to the teacher's; None where they are the same.
    """

    def __init__(
        self, files: ModelFiles, config: TeacherConfig, id_map: IdMap | None = None
    ) -> None:
        """Load the model."""
        self._config = config
        self._device = pick_device(config.device)
        self._members = 1 + len(files.members)
        self._max_length = min(one.max_length for one in (files, *files.members))
        self._logits = MappedLogits(load_logits(files, config, self._device), id_map, self._device)
        self._time = ModelTime(self._device)

    @property
    def numeric_class(self) -> str:
        """Engine, version, dtype and device; and how many models are mixed."""
        engine = f"transformers-{transformers.__version__}-{self._config.dtype}-{self._device.type}"
        return engine if self._members == 1 else f"ensemble-{self._members}-{engine}"

    def stats(self) -> dict[str, float]:
        """Seconds in which the model ran; see `teacher.stats_of`."""
        return {"model_s": self._time.seconds}

    def score(self, rows: Sequence[ScoreRow], spec: ScoreSpec) -> Iterator[tuple[int, RowScores]]:
        """Score rows in batches of like length; see `teacher.Teacher`."""
        lengths = [len(row.token) for row in rows]
        too_long = [i for i, n in enumerate(lengths) if n > self._max_length]
        if too_long:
            got = f"{lengths[too_long[0]]} tokens"
            expected = f"at most the teacher's {self._max_length} tokens"
            raise InputError(f"row {too_long[0]}", expected, got, "Sample shorter completions.")
        for batch in length_batches(lengths, self._config.max_batch_tokens):
            scored = self._score_batch({i: rows[i] for i in batch}, spec)
            yield from zip(batch, scored, strict=True)

    @torch.inference_mode()
    def _score_batch(self, batch: dict[int, ScoreRow], spec: ScoreSpec) -> list[RowScores]:
        rows = list(batch.values())
        tokens, targets = [row.token for row in rows], [row.targets for row in rows]
        with self._time.running():
            hidden_PH = self._logits.hidden(tokens, targets)
        scored = score_hidden(hidden_PH, batch, spec, self._head, self._config.head_rows)
        self._time.settle()
        return scored

    def _head(
        self, hidden_PH: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._time.running():
            return self._logits.logits(hidden_PH, temperature)


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
