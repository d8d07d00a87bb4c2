"""Linear layers whose weights are laid out for the CPU once, at load time.

For the few dozen rows of a decoding step, oneDNN's products on a weight in its own layout beat plain linears 1.2 to 1.7
times in bfloat16 and 2 to 4 times in float32 (SmolLM2-135M's shapes, 32 rows; at 1 row 1.6 times).

In float32 oneDNN adds the products of an output one after the other, over all inputs, and rounds more than a BLAS that
adds in blocks: over SmolLM2's 30 layers the logits were up to 2e-4 off, against 7e-5 for Transformers, both measured in
float64. So wide float32 inputs are cut into parts, each summed by itself.
"""

# Annotations are evaluated: functions of this module are compiled.
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SUM = 192
"""Inputs that one float32 product sums over: as many as the BLAS adds up at a time, so that results are its results."""
EXPECTED_ROWS = 32
"""Rows that the layout is chosen for; other numbers work as well, and as fast within what can be measured."""


class Linear(NamedTuple):
    """`x @ weight.T + bias`, as compiled functions take it."""

    parts: list[Tensor]
    """The weight [out_features, in_features], cut by inputs; each in oneDNN's layout if it is packed."""
    widths: list[int]
    """Inputs of each part."""
    bias: Tensor | None
    is_packed: bool
    is_steady: bool
    """A single row is computed twice: matrix products have kernels of their own for one row, which round otherwise."""


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Map [..., in_features] to [..., out_features]."""
    if layer.is_steady and x.shape[-2] == 1:
        return _linear(_twice(x), layer)[..., :1, :]
    return _linear(x, layer)


def linear_add(x: Tensor, layer: Linear, residual: Tensor) -> Tensor:
    """`linear(x) + residual`."""
    if layer.is_steady and x.shape[-2] == 1:
        return _linear_add(_twice(x), layer, _twice(residual))[..., :1, :]
    return _linear_add(x, layer, residual)


def _linear(x: Tensor, layer: Linear) -> Tensor:
    if not layer.is_packed:
        return F.linear(x, layer.parts[0], layer.bias)
    inputs = torch.split_with_sizes(x, layer.widths, -1)
    # PyTorch's own compiler calls the packed product by its private name too.
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs[0], layer.parts[0], layer.bias, "none", [], "")  # noqa: SLF001
    for index in range(1, len(layer.parts)):
        output = _product_and_sum(inputs[index], layer.parts[index], None, output)
    return output


def _linear_add(x: Tensor, layer: Linear, residual: Tensor) -> Tensor:
    if layer.is_packed and len(layer.parts) == 1:
        return _product_and_sum(x, layer.parts[0], layer.bias, residual)
    return _linear(x, layer).add_(residual)  # the residual last: it is often much larger than each part


def _product_and_sum(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    # in one operator, rounded once
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, other, weight, bias, "add")  # noqa: SLF001
    return output


def _twice(row: Tensor) -> Tensor:
    return torch.cat((row, row), -2)


class FastLinear(nn.Module):
    """The same as a module, in the place of one of the model's own."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.linear = layer
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked; for code that looks at a layer's weight, and slow."""
        return torch.cat([part.to_dense() for part in self.linear.parts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return linear(x, self.linear)


def can_pack(weight: Tensor) -> bool:
    """Whether this machine's PyTorch can prepack the weight and multiply by it natively."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - it has no public name
    return weight.dtype == torch.float32


def pack(weight: Tensor, bias: Tensor | None, *, steady: bool = False) -> Linear:
    """A linear layer of the weight [out_features, in_features], packed where that works."""
    weight, bias = weight.detach(), bias.detach() if bias is not None else None
    if not can_pack(weight):
        return Linear([weight], [weight.shape[1]], bias, is_packed=False, is_steady=steady)
    pieces = weight.split(MAX_SUM if weight.dtype is torch.float32 else weight.shape[1], dim=1)
    packed = [torch.ops.mkldnn._reorder_linear_weight(piece.contiguous(), EXPECTED_ROWS) for piece in pieces]  # noqa: SLF001 - as above
    return Linear(packed, [piece.shape[1] for piece in pieces], bias, is_packed=True, is_steady=steady)


def merged(linears: Sequence[nn.Linear], *, steady: bool = False) -> Linear:
    """One layer that computes several over the same input: their outputs side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = biases_of(linears)
    return pack(weight, torch.cat(biases) if biases else None, steady=steady)


def biases_of(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """The biases of layers that are to merge, none if they have none."""
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    present = [bias for bias in biases if bias is not None]
    assert len(present) in (0, len(linears)), "layers to merge have a bias each or none"
    return present
