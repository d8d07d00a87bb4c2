"""The forward of Llama-like layers in few operators: Llama, Mistral, Qwen2 and Qwen3, and whatever shares their code.

A decoding step on the CPU is hundreds of small operators, each of which costs microseconds before it computes anything
and gives the interpreter's lock away once. A module's call costs microseconds too, so a layer runs its
parts' `forward`. Per layer, attention aside, these are left:

    norm   qkv   (head norms)   roll, mul, addcmul (rope)   attend   out + residual
    norm   gate|up   silu, mul   down + residual

`families` says which models these are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.passes.families import is_recognised, replace_layers
from dendrite.engine.passes.linear import merged, pack
from dendrite.engine.passes.steady import SteadyRotary, steady_silu


def make_lean(model: PreTrainedModel, *, steady: bool = False) -> None:
    """Replace the layers of a recognised decoder, all or none, freeing each layer's weights as it goes.

    With `steady` a row's bits do not depend on how many rows there are; see `steady`.
    """
    decoder = model.get_decoder()
    if not is_recognised(decoder):
        return
    decoder.rotary_emb = _LeanRotary(SteadyRotary(decoder.rotary_emb) if steady else decoder.rotary_emb)
    decoder.norm = _LeanNorm(decoder.norm)
    replace_layers(decoder, partial(_LeanLayer, silu=steady_silu if steady else F.silu))


class _LeanNorm(nn.Module):
    """RMS norm as one operator."""

    def __init__(self, norm: llama.LlamaRMSNorm) -> None:
        super().__init__()
        self._weight: Tensor = norm.weight.detach()
        self._epsilon: float = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)


class _LeanRotary(nn.Module):
    """The model's own rotary embedding, its sine signed once a step so that rope needs no negation in the layers.

    rope(x) = x * cos + [-x2, x1] * sin = x * cos + [x2, x1] * [-sin1, sin2]        with x = [x1, x2]
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self._rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine and the signed sine, each [num_rows, 1, head_dim]."""
        cos, sin = self._rotary(x, position_ids=position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)


class _LeanLayer(nn.Module):
    """A decoder layer over packed rows."""

    def __init__(self, layer: llama.LlamaDecoderLayer, *, silu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._silu = silu
        attention, mlp = layer.self_attn, layer.mlp
        self._layer_idx: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._head_dim: int = attention.head_dim
        self._num_heads: int = attention.q_proj.out_features // self._head_dim
        self._num_kv_heads: int = attention.k_proj.out_features // self._head_dim
        self._head_norms = _HeadNorms(attention) if hasattr(attention, "q_norm") else None
        self._input_norm = _LeanNorm(layer.input_layernorm)
        self._qkv = merged([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = pack(attention.o_proj.weight, attention.o_proj.bias)
        self._mlp_norm = _LeanNorm(layer.post_attention_layernorm)
        self._gate_up = merged([mlp.gate_proj, mlp.up_proj])
        self._down = pack(mlp.down_proj.weight, mlp.down_proj.bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        dendrite_step: AttentionStep,
        **_: object,
    ) -> Tensor:
        """Map hidden states [1, num_rows, hidden_size] to the same; other keywords are those that attention ignores."""
        hidden = hidden_states[0]
        hidden = self._out.forward_add(self._attend(hidden, position_embeddings, dendrite_step), hidden)
        gate, up = self._gate_up.forward(self._mlp_norm.forward(hidden)).chunk(2, dim=-1)
        return self._down.forward_add(self._silu(gate).mul_(up), hidden).unsqueeze(0)

    def _attend(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        # [num_rows, hidden_size] -> [num_rows, num_heads * head_dim]
        qkv = self._qkv.forward(self._input_norm.forward(hidden)).unflatten(-1, (-1, self._head_dim))
        rotated = qkv[:, : -self._num_kv_heads]  # queries and keys, [num_rows, num_heads + num_kv_heads, head_dim]
        qk = self._head_norms(rotated) if self._head_norms is not None else rotated
        cos, signed_sin = rotation
        torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), signed_sin, out=rotated)
        kv = qkv[:, self._num_heads :].unflatten(1, (2, self._num_kv_heads))
        return step.attend(self._layer_idx, qkv[:, : self._num_heads], kv, self._scale).flatten(1)


class _HeadNorms(nn.Module):
    """The norms of queries and keys (Qwen3), all heads at once."""

    def __init__(self, attention: llama.LlamaAttention) -> None:
        super().__init__()
        query_norm, key_norm = cast("tuple[llama.LlamaRMSNorm, ...]", (attention.q_norm, attention.k_norm))
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        num_heads = num_kv_heads * attention.num_key_value_groups
        query, key = query_norm.weight.detach(), key_norm.weight.detach()
        self._weight = torch.cat((query.expand(num_heads, -1), key.expand(num_kv_heads, -1)))
        self._epsilon = query_norm.variance_epsilon

    def forward(self, qk: Tensor) -> Tensor:
        """Map [num_rows, num_heads + num_kv_heads, head_dim] to the same."""
        return F.rms_norm(qk, qk.shape[-1:], None, self._epsilon) * self._weight
