"""The residual stream between fused layers, the norms that read it and the products that go into and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.kernels.activation import silu_mul
from dendrite.engine.kernels.linear import NO_FUSION, Fusion, Tiling, one_row_linear
from dendrite.engine.kernels.norm import add_rms_norm
from dendrite.engine.passes.linear import biases_of


@dataclass
class Stream:
    """The hidden states between two layers: `residual + delta`, not yet added."""

    residual: Tensor
    """[num_rows, hidden_size]; what comes after adds to it in place."""
    delta: Tensor | None
    """The same shape, or None for zero."""


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

    Where it has a tiling, one row goes through a kernel that also does what stands beside the product; all else goes
    through the BLAS, with a kernel each for the rest.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, is_gated: bool = False) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = biases_of(linears)
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(biases).detach() if biases else None
        self.is_gated = is_gated
        """Whether it is a gate's and an up projection, used by `gated` alone."""
        self.tiling: Tiling | None = None
        """How to cut it for one row; None for the BLAS."""

    def of_normed(self, stream: Stream, norm: Norm) -> Tensor:
        """The product over the normed stream: [num_rows, width]."""
        if (tiling := self._tiling(stream.residual)) is None:
            return F.linear(norm(stream), self.weight, self.bias)
        return self._with_norm(stream, norm, tiling, is_gated=False)

    def gated(self, stream: Stream, norm: Norm) -> Tensor:
        """`silu(gate) * up` of the normed stream, for a gate and an up projection: [num_rows, width / 2]."""
        if (tiling := self._tiling(stream.residual)) is None:
            return silu_mul(F.linear(norm(stream), self.weight, self.bias))
        return self._with_norm(stream, norm, tiling, is_gated=True)

    def add_to(self, stream: Stream, x: Tensor) -> None:
        """Add the product over x to the stream, now or with what comes next."""
        if (tiling := self._tiling(x)) is None:
            stream.delta = F.linear(x, self.weight, self.bias)
        else:
            one_row_linear(x, self.weight, self.bias, tiling, Fusion(residual=stream.residual))

    def _with_norm(self, stream: Stream, norm: Norm, tiling: Tiling, *, is_gated: bool) -> Tensor:
        if stream.delta is not None:  # still to be added, which the kernel of the norm does along with it
            return one_row_linear(norm(stream), self.weight, self.bias, tiling, replace(NO_FUSION, is_gated=is_gated))
        fusion = Fusion(norm=(norm.weight, norm.epsilon), is_gated=is_gated)
        return one_row_linear(stream.residual, self.weight, self.bias, tiling, fusion)

    def _tiling(self, x: Tensor) -> Tiling | None:
        return self.tiling if len(x) == 1 else None
