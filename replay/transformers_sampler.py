"""Sampling with transformers' batched generate, with the exact logprob of every drawn token.

Temperature and filters run as logits processors of ours, and after them a recorder that keeps one
step's log probabilities until the drawn token is known: memory is B x V, whatever the length.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stillroom.cache.causal_lm import load_causal_lm, pick_device
from stillroom.cache.errors import NumericsError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.replay.sampler import Sampled, SamplerConfig


class TransformersSampler:
    """A student in this process.

    Args:
        files: its inspected folder.
        config: how it samples.
    """

    def __init__(self, files: ModelFiles, config: SamplerConfig) -> None:
        """Load the model."""
        self._config = config
        self._vocab_size = files.vocab_size
        self._device = pick_device(config.device)
        self._model: Any = load_causal_lm(files, config.dtype, self._device)
        self._stop = stop_ids(files, self._model.generation_config)
        # A checkpoint's own generation settings (penalties, filters) would change what is sampled.
        self._model.generation_config = GenerationConfig()

    @property
    def model(self) -> PreTrainedModel:
        """The model that samples."""
        model: PreTrainedModel = self._model
        return model

    def take_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Sample with these weights of the same model from now on; where they have the sampler's
        dtype and device they are shared, not copied."""
        dtype = self._model.dtype
        moved = {
            name: tensor.to(self._device, dtype if tensor.is_floating_point() else None)
            for name, tensor in state.items()
        }
        self._model.load_state_dict(moved, assign=True)

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """Sample a completion of each prompt; see `sampler.StudentSampler`."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = self._config.batch_rows
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            sampled = self._sample_batch([prompts[i] for i in batch], seed + start)
            yield from zip(batch, sampled, strict=True)

    @torch.inference_mode()
    def _sample_batch(self, prompts: list[np.ndarray], seed: int) -> list[Sampled]:
        width = max(len(p) for p in prompts)
        pad = self._stop[0] if self._stop else 0
        ids = np.full((len(prompts), width), pad, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        recorder = self._recorder()
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self._config.max_new_tokens,
            eos_token_id=self._stop or None,
            pad_token_id=pad,
        )
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            sequences = self._model.generate(
                torch.from_numpy(ids).to(self._device),
                attention_mask=torch.from_numpy(mask).to(self._device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([*self._filters(), recorder]),
            )
        drawn = sequences[:, width:]
        logprob = recorder.finish(drawn[:, -1])
        columns = [column.cpu().numpy() for column in (drawn, logprob, *recorder.extra())]
        return [self._cut(*row) for row in zip(*columns, strict=True)]

    def _recorder(self) -> "LogprobRecorder":
        extra, drawn = self._config.extra, self._config.extra_drawn
        return LogprobRecorder(extra if drawn else min(extra, self._vocab_size), drawn=drawn)

    def _filters(self) -> list[LogitsProcessor]:
        filters: list[LogitsProcessor] = [VocabularyMask(self._vocab_size)]
        if self._config.temperature != 1.0:
            filters.append(TemperatureLogitsWarper(self._config.temperature))
        if self._config.top_k:
            filters.append(TopKLogitsWarper(self._config.top_k))
        if self._config.top_p < 1.0:
            filters.append(TopPLogitsWarper(self._config.top_p))
        return filters

    def _cut(
        self,
        tokens: np.ndarray,
        logprob: np.ndarray,
        extra_id: np.ndarray,
        extra_logprob: np.ndarray,
    ) -> Sampled:
        stops = np.flatnonzero(np.isin(tokens, self._stop))
        end = int(stops[0]) + 1 if len(stops) else len(tokens)
        return Sampled(
            tokens[:end].astype(np.uint32),
            np.minimum(logprob[:end], 0).astype(np.float32),
            "stop" if len(stops) else "length",
            extra_id[:end].astype(np.uint32) if self._config.extra else None,
            np.minimum(extra_logprob[:end], 0).astype(np.float32) if self._config.extra else None,
        )


class VocabularyMask(LogitsProcessor):
    """Masks the rows of a padded head that are no token; must be the first processor.

    Args:
        vocab_size: ids that exist.
    """

    def __init__(self, vocab_size: int) -> None:
        """Keep the size."""
        self._vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask one step's scores."""
        scores[:, self._vocab_size :] = -torch.inf
        return scores


class LogprobRecorder(LogitsProcessor):
    """Notes the log probability of every drawn token; must be the last processor.

    Args:
        extra: tokens to note beside each.
        drawn: whether those are further draws; else they are the likeliest.
    """

    def __init__(self, extra: int = 0, *, drawn: bool = False) -> None:
        """Start with nothing recorded."""
        self._extra, self._draws = extra, drawn
        self._pending: torch.Tensor | None = None
        self._columns: list[torch.Tensor] = []
        self._noted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Note the token drawn from the last step's scores, and keep this step's."""
        if self._pending is not None:
            self._take(input_ids[:, -1])
        self._pending = torch.log_softmax(scores.float(), dim=-1)
        if torch.isnan(self._pending).any():
            do = "Sample in float32 or bfloat16, or check the student's weights."
            raise NumericsError("student", "finite logits", "NaN or infinite ones", do)
        return scores

    def finish(self, last: torch.Tensor) -> torch.Tensor:
        """(B, T) logprobs of all drawn tokens, given the last column of them."""
        self._take(last)
        return torch.stack(self._columns, dim=1)

    def extra(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, M) ids of the tokens beside the drawn ones, and their logprobs."""
        logprob, ids = zip(*self._noted, strict=True)
        return torch.stack(ids, dim=1), torch.stack(logprob, dim=1)

    def _take(self, drawn: torch.Tensor) -> None:
        assert self._pending is not None
        if self._draws:
            ids = self._pending.exp().multinomial(self._extra, replacement=True)
            self._noted.append((self._pending.gather(1, ids), ids))
        else:
            logprob, ids = self._pending.topk(self._extra, dim=1)
            self._noted.append((logprob, ids))
        self._columns.append(self._pending.gather(1, drawn[:, None]).squeeze(1))


def stop_ids(files: ModelFiles, generation_config: GenerationConfig | None) -> list[int]:
    """Stop tokens of a model, from its generation config and its tokenizer; may be none."""
    from transformers import AutoTokenizer

    eos = getattr(generation_config, "eos_token_id", None)
    found = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    own = AutoTokenizer.from_pretrained(files.folder).eos_token_id
    return sorted({*found, *([] if own is None else [own])})
