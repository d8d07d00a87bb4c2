"""One layer of a Llama-like decoder in few operators, as functions that can be compiled, and a step's layers as one.

norm   qkv   (head norms)   roll, mul, addcmul (rope)   keep K/V, attend   out + residual
norm   gate|up   silu, mul   down + residual
"""

# Annotations are evaluated: functions of this module are compiled.
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dendrite.engine.attention.cpu_tiles import TileViews, attend
from dendrite.engine.passes.linear import Linear, linear, linear_add


class LayerWeights(NamedTuple):
    """What a layer is made of."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """What attention scores are multiplied by."""
    epsilon: float
    """Of the norms."""
    input_norm: Tensor  # [hidden_size]
    qkv: Linear
    head_norms: Tensor | None  # [num_heads + num_kv_heads, head_dim], of queries and keys (Qwen3)
    out: Linear
    mlp_norm: Tensor  # [hidden_size]
    gate_up: Linear
    down: Linear


class StepRows(NamedTuple):
    """What the layers need to know of a step's rows."""

    cos: Tensor  # [num_rows, 1, head_dim]
    signed_sin: Tensor  # likewise
    slots: Tensor  # [num_rows], where each row's K/V is kept
    tiles: list[TileViews]


def project(layer: LayerWeights, hidden: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Queries and keys, rotated, and values of [num_rows, hidden_size].

    Args:
        layer: the layer.
        hidden: [num_rows, hidden_size].
        cos: [num_rows, 1, head_dim].
        signed_sin: likewise; rope(x) = x * cos + [x2, x1] * [-sin1, sin2] with x = [x1, x2].

    Returns:
        [num_rows, num_heads + 2 * num_kv_heads, head_dim].
    """
    normed = torch.rms_norm(hidden, layer.input_norm.shape, layer.input_norm, layer.epsilon)
    qkv: Tensor = linear(normed, layer.qkv).unflatten(-1, (-1, layer.head_dim))
    rotated = qkv[:, : -layer.num_kv_heads]
    qk = rotated
    head_norms = layer.head_norms
    if head_norms is not None:
        qk = torch.rms_norm(rotated, head_norms.shape[1:], None, layer.epsilon) * head_norms
    torch.addcmul(qk * cos, qk.roll(layer.head_dim // 2, -1), signed_sin, out=rotated)
    return qkv


def queries_of(layer: LayerWeights, qkv: Tensor) -> Tensor:
    """[num_rows, num_heads, head_dim] of what `project` gave."""
    return qkv[:, : layer.num_heads]


def kv_of(layer: LayerWeights, qkv: Tensor) -> Tensor:
    """[num_rows, 2, num_kv_heads, head_dim] of what `project` gave."""
    kv: Tensor = qkv[:, layer.num_heads :].unflatten(1, (2, layer.num_kv_heads))
    return kv


def finish(layer: LayerWeights, attended: Tensor, hidden: Tensor, pieces: list[int]) -> Tensor:
    """The rest of the layer behind attention.

    Args:
        layer: the layer.
        attended: [num_rows, num_heads, head_dim].
        hidden: [num_rows, hidden_size], what came into the layer.
        pieces: numbers of rows whose activations are computed one after the other (`steady`); all at once if empty.

    Returns:
        [num_rows, hidden_size].
    """
    hidden = linear_add(attended.flatten(1), layer.out, hidden)
    normed = torch.rms_norm(hidden, layer.mlp_norm.shape, layer.mlp_norm, layer.epsilon)
    gate, up = linear(normed, layer.gate_up).chunk(2, -1)
    return linear_add(_silu(gate, pieces).mul_(up), layer.down, hidden)


def run_layers(layers: list[LayerWeights], hidden: Tensor, rows: StepRows, stored: Tensor) -> Tensor:
    """All layers over a step's rows, which keep their K/V on the way.

    Args:
        layers: the decoder's.
        hidden: [num_rows, hidden_size], what comes in; its memory stays as it is.
        rows: what belongs to the rows.
        stored: [num_layers, 2, num_kv_heads, num_slots, head_dim].

    Returns:
        [num_rows, hidden_size], before the final norm.
    """
    for index, layer in enumerate(layers):
        qkv = project(layer, hidden, rows.cos, rows.signed_sin)
        stored[index].index_copy_(2, rows.slots, kv_of(layer, qkv).permute(1, 2, 0, 3))
        attended = attend(rows.tiles, stored[index], queries_of(layer, qkv), layer.scale)
        hidden = finish(layer, attended, hidden, [])
    return hidden


def _silu(x: Tensor, pieces: list[int]) -> Tensor:
    if len(pieces) <= 1:
        return F.silu(x)
    return torch.cat([F.silu(piece) for piece in x.split_with_sizes(pieces)])
