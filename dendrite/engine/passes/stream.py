"""The residual stream between fused layers, the norms that read it and the products that go into and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.kernels.activation import silu_mul
from dendrite.engine.kernels.few_rows import Cut, few_rows_linear, few_rows_sums, row_tiles
from dendrite.engine.kernels.linear import Fusion, Tiling, one_row_linear
from dendrite.engine.kernels.norm import add_rms_norm
from dendrite.engine.passes.linear import biases_of

LONE_ROW = 0
"""Among a projection's cuts, that of one row."""


@dataclass
class Stream:
    """The hidden states between two layers: `residual + delta`, not yet added."""

    residual: Tensor
    """[num_rows, hidden_size]; what comes after adds to it in place."""
    delta: Tensor | None
    """The same shape, or sums that make it up, [num_parts, num_rows, hidden_size]; None for zero."""

    def total(self) -> Tensor:
        """The sum, in new memory."""
        if self.delta is None:
            return self.residual.clone()
        return self.residual + self.delta.view(-1, *self.residual.shape).sum(0).to(self.residual.dtype)


class Norm:
    """An RMS norm that adds what the last product left to be added."""

    def __init__(self, norm: llama.LlamaRMSNorm) -> None:
        self.weight: Tensor = norm.weight.detach()
        self.epsilon: float = norm.variance_epsilon

    def __call__(self, stream: Stream) -> Tensor:
        """The normed sum; the stream's residual holds the sum afterwards, and there is nothing left to add."""
        normed = add_rms_norm(stream.residual, stream.delta, self.weight, self.epsilon)
        stream.delta = None
        return normed


class Projection:
    """Linear layers over one input as one product: `x @ weight.T + bias`, their outputs side by side.

    Where it has a cut for them, a few rows go through a kernel for few rows; where it has a tiling, one row goes
    through a kernel that also does what stands beside it. All else goes through the BLAS, and has kernels for the rest.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, is_gated: bool = False) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = biases_of(linears)
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(biases).detach() if biases else None
        self.is_gated = is_gated
        """Whether it is a gate's and an up projection's."""
        self.tiling: Tiling | None = None
        """How to cut it for one row."""
        self.cuts: dict[int, Cut] = {}
        """How to cut it for a few rows, by their number of tiles or `LONE_ROW`; all layers have the same."""

    def of_normed(self, stream: Stream, norm: Norm) -> Tensor:
        """The product over the normed stream, of a gate and an up projection `silu(gate) * up`.

        Returns:
            [num_rows, width], gated half as wide; or sums that make it up, [num_parts, num_rows, width] float32.
        """
        if (tiling := self._tiling(stream.residual)) is None:
            return self.product(norm(stream))
        if stream.delta is not None:  # still to be added, which the kernel of the norm does along with it
            fusion = Fusion(is_gated=self.is_gated)
            return one_row_linear(norm(stream), self.weight, self.bias, tiling, fusion)
        fusion = Fusion(norm=(norm.weight, norm.epsilon), is_gated=self.is_gated)
        return one_row_linear(stream.residual, self.weight, self.bias, tiling, fusion)

    def add_to(self, stream: Stream, x: Tensor) -> None:
        """Add the product over x to the stream, now or with what comes next."""
        if (tiling := self._tiling(x)) is None:
            stream.delta = self.product(x)
        else:
            one_row_linear(x, self.weight, self.bias, tiling, Fusion(residual=stream.residual))

    def product(self, x: Tensor) -> Tensor:
        """The product over x [num_rows, depth] by itself; see `of_normed`."""
        cut = self.cuts.get(row_tiles(len(x)) if len(x) > 1 else LONE_ROW)
        if cut is None:
            product = F.linear(x, self.weight, self.bias)
            return silu_mul(product) if self.is_gated else product
        if cut.num_splits > 1:
            return few_rows_sums(x, self.weight, self.bias, cut)
        return few_rows_linear(x, self.weight, self.bias, cut, is_gated=self.is_gated)

    def _tiling(self, x: Tensor) -> Tiling | None:
        return self.tiling if len(x) == 1 else None
