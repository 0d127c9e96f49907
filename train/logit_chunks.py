"""Logits of a few positions at a time, in buffers that all chunks of positions share, and the way
back from their gradients."""

# Shapes: T positions, n of them in a chunk, H hidden, V vocabulary without padding of the head.

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stillroom.train.output_head import OutputHead, wide

WEIGHT_ROWS = 4096
"""Rows of the weight that are widened at once, or of its gradient that are computed at once, where
products are of half precision."""


class LogitChunks:
    """An output head for chunks of at most `num_rows` positions.

    Logits are sums in float32 also where the factors are in half precision, as those of bfloat16
    carry an error of 0.06 from 16 on. Its buffers are as large as fit in `max_bytes`, but hold one
    position at least. On a CPU fresh memory costs page faults, more than any one pass over it, so
    no chunk allocates one.

    Args:
        head: its weight and bias are used without their graph.
        hidden: (T, H) float; only T, the dtype and the device are read.
        vocab_size: V; rows of the head from there on take no part.
        temperature: divides the logits, > 0.
        max_bytes: for all (n, V) buffers together, and what is `beside` them.
        num_spare: further (n, V) buffers, `spare`: 0 or 1.
        beside: bytes a position that the caller holds beside them, out of `max_bytes` too.
    """

    def __init__(
        self,
        head: OutputHead,
        hidden: Tensor,
        vocab_size: int,
        temperature: float,
        max_bytes: int,
        num_spare: int = 0,
        beside: int = 0,
    ) -> None:
        """Convert the head, and reserve the buffers."""
        self.dtype = head.product_dtype(hidden)
        dtype, device = wide(self.dtype), hidden.device
        self.weight = head.weight.detach()[:vocab_size].to(self.dtype)
        self.bias = None
        if head.bias is not None:
            self.bias = head.bias.detach()[:vocab_size].to(dtype)
        self.soft_cap = head.soft_cap
        self.slope = head.scale / temperature
        """Derivative of a logit over the temperature by the product, but for the soft-cap's."""
        self._cap = None if head.soft_cap is None else head.soft_cap / temperature
        is_half = dtype != self.dtype
        bytes_each = dtype.itemsize * (1 + num_spare) + is_half * self.dtype.itemsize
        most = max(1, max_bytes // (bytes_each * vocab_size + beside))
        num_chunks = math.ceil(len(hidden) / most)
        self.num_rows = math.ceil(len(hidden) / max(1, num_chunks))
        """Positions of a chunk; the last may have fewer. 0 if there are none."""
        shape = self.num_rows, vocab_size
        self._logits = torch.empty(shape, dtype=dtype, device=device)
        self._half = torch.empty(shape, dtype=self.dtype, device=device) if is_half else None
        self._spare = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_spare)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the temperature of hidden states (n, H): (n, V), a buffer of this object.

        It holds them until the next call, and is the caller's to overwrite.
        """
        logits, hidden = self._logits[: len(hidden)], hidden.to(self.dtype)
        factor = self.slope if self._cap is None else self.slope / self._cap
        if self._half is not None and hidden.is_cuda:
            self._half_product(hidden, factor, logits)
        else:
            self._wide_product(hidden.to(logits.dtype), factor, logits)
        return logits if self._cap is None else logits.tanh_().mul_(self._cap)

    def _half_product(self, hidden: Tensor, factor: float, logits: Tensor) -> None:
        """Multiply half precision and keep the float32 sums, which only CUDA can."""
        torch.mm(hidden, self.weight.t(), logits.dtype, out=logits)
        if self.bias is not None:
            logits.add_(self.bias)
        if factor != 1.0:
            logits.mul_(factor)

    def _wide_product(self, hidden: Tensor, factor: float, logits: Tensor) -> None:
        """Multiply in the logits' dtype; a half-precision weight is widened by blocks of rows."""
        vocab_size = len(self.weight)
        size = vocab_size if self._half is None else WEIGHT_ROWS
        for first in range(0, vocab_size, size):
            rows = slice(first, first + size)
            out, weight = logits[:, rows], self.weight[rows].to(logits.dtype)
            # The factor belongs to the product: a pass over (n, V) less.
            start, keep = (out, 0.0) if self.bias is None else (self.bias[rows], factor)
            torch.addmm(start, hidden, weight.t(), beta=keep, alpha=factor, out=out)

    def spare(self, num_rows: int) -> Tensor:
        """A buffer of (num_rows, V) beside the logits."""
        return self._spare[0][:num_rows]

    def square(self, logits: Tensor) -> Tensor:
        """Keep the square of capped logits in the spare buffer, for `uncap`."""
        return torch.square(logits, out=self.spare(len(logits)))

    def uncap(self, gradient: Tensor, square: Tensor) -> None:
        """Multiply a gradient by the soft-cap's derivative, 1 - (logit / cap)^2."""
        assert self._cap is not None
        gradient.addcmul_(gradient, square, value=-1.0 / self._cap**2)

    def as_product(self, gradient: Tensor) -> Tensor:
        """The gradient (n, V) of the products, in their dtype, for the two below."""
        if self._half is None:
            return gradient
        return self._half[: len(gradient)].copy_(gradient)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """The gradient (n, H) of the hidden states that the products were made of."""
        return torch.mm(gradient, self.weight)

    def add_to_weight(self, gradient: Tensor, hidden: Tensor, weight_grad: Tensor) -> None:
        """Add the gradient of the weight to `weight_grad`, (V, H) float32 or float64."""
        hidden = hidden.to(self.dtype)
        if self._half is None:
            weight_grad.addmm_(gradient.t(), hidden)
            return
        for start in range(0, len(weight_grad), WEIGHT_ROWS):
            rows = slice(start, start + WEIGHT_ROWS)
            weight_grad[rows].add_(torch.mm(gradient[:, rows].t(), hidden))


@torch.no_grad()
def logit_chunks(
    head: OutputHead,
    hidden: Tensor,
    max_bytes: int = 1 << 28,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of all positions, a chunk at a time, for measuring; no gradient.

    Args:
        head: the model's.
        hidden: (T, H) float.
        max_bytes: for the (n, V) buffers; one position is held at least.
        temperature: divides the logits, > 0.
        vocab_size: V without padding of the head. None: all its rows.

    Yields:
        Which positions, and their (n, V) float32 logits (float64 for a product of float64) over the
        temperature. They hold until the next chunk is asked for, and may be overwritten.
    """
    vocab_size = head.weight.shape[0] if vocab_size is None else vocab_size
    made = LogitChunks(head, hidden, vocab_size, temperature, max_bytes)
    for start in range(0, len(hidden), max(1, made.num_rows)):
        rows = slice(start, min(start + made.num_rows, len(hidden)))
        yield rows, made.logits(hidden[rows])
