"""Linear layers whose weights are laid out for the CPU once, at load time.

For the few dozen rows of a decoding step, oneDNN's products on a weight in its own layout beat plain linears 1.2 to 1.7
times in bfloat16 and 2 to 4 times in float32 (SmolLM2-135M's shapes, 32 rows; at 1 row 1.6 times).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SUM = 192
"""Inputs that one float32 product sums over: as many as the BLAS adds up at a time, so that results are its results."""
EXPECTED_ROWS = 32
"""Rows that the layout is chosen for; other numbers work as well, and as fast within what can be measured."""


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` on a prepacked weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)  # noqa: SLF001
        self._linear = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - the names that PyTorch's own
        self._linear_binary = torch.ops.mkldnn._linear_pointwise.binary  # noqa: SLF001 - compiler calls them by

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked; for code that looks at a layer's weight, and slow."""
        unpacked: Tensor = self._packed.to_dense()
        return unpacked

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        output: Tensor = self._linear(x, self._packed, self.bias, "none", [], "")
        return output

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`, in one operator."""
        output: Tensor = self._linear_binary(x, residual, self._packed, self.bias, "add")
        return output


class SplitLinear(nn.Module):
    """A packed float32 layer whose sums are as exact as plain linears'.

    oneDNN adds the products of an output one after the other, over all inputs, and rounds more than a BLAS that adds in
    blocks: over SmolLM2's 30 layers the logits were up to 2e-4 off, against 7e-5 for Transformers, both measured in
    float64. So the inputs are cut into parts, each summed by itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        parts = weight.split(MAX_SUM, dim=1)
        self._widths = [part.shape[1] for part in parts]
        self._first = PackedLinear(parts[0].contiguous(), bias)
        self._others = [PackedLinear(part.contiguous(), None) for part in parts[1:]]

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked; for code that looks at a layer's weight, and slow."""
        return torch.cat([self._first.weight, *(part.weight for part in self._others)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        first, *others = x.split(self._widths, dim=-1)
        output = self._first.forward(first)
        for part, part_input in zip(self._others, others, strict=True):
            output = part.forward_add(part_input, output)
        return output

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`, the residual last: it is often much larger than each part."""
        return self.forward(x).add_(residual)


class PlainLinear(nn.Module):
    """The same on the weight as it is, where it cannot be packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(x, self.weight, self.bias)

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`forward(x) + residual`."""
        return self.forward(x).add_(residual)


def can_pack(weight: Tensor) -> bool:
    """Whether this machine's PyTorch can prepack the weight and multiply by it natively."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return weight.dtype == torch.float32


FastLinear: TypeAlias = PackedLinear | SplitLinear | PlainLinear


def pack(weight: Tensor, bias: Tensor | None) -> FastLinear:
    """A linear layer of the weight [out_features, in_features], packed where that works."""
    weight, bias = weight.detach(), bias.detach() if bias is not None else None
    if not can_pack(weight):
        return PlainLinear(weight, bias)
    is_split = weight.dtype == torch.float32 and weight.shape[1] > MAX_SUM
    return SplitLinear(weight, bias) if is_split else PackedLinear(weight, bias)


def merged(linears: Sequence[nn.Linear]) -> FastLinear:
    """One layer that computes several over the same input: their outputs side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = biases_of(linears)
    return pack(weight, torch.cat(biases) if biases else None)


def biases_of(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """The biases of layers that are to merge, none if they have none."""
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    present = [bias for bias in biases if bias is not None]
    assert len(present) in (0, len(linears)), "layers to merge have a bias each or none"
    return present
