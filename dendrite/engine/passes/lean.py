"""The forward of Llama-like layers in few operators: Llama, Mistral, Qwen2 and Qwen3, and whatever shares their code.

A decoding step on the CPU is hundreds of small operators, each of which costs microseconds before it computes anything
and gives the interpreter's lock away once. Per layer, attention aside, these are left:

    norm   qkv   (head norms)   roll, mul, addcmul (rope)   attend   out + residual
    norm   gate|up   silu, mul   down + residual

A family is recognised by the exact types of its modules: one that inherits a layer and changes it is left alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.passes.linear import merged, pack


def make_lean(model: PreTrainedModel) -> None:
    """Replace the layers of a recognised decoder, all or none, freeing each layer's weights as it goes."""
    decoder = model.get_decoder()
    if not _is_recognised(decoder):
        return
    decoder.rotary_emb = _LeanRotary(decoder.rotary_emb)
    decoder.norm = _LeanNorm(decoder.norm)
    for index, layer in enumerate(_layers(decoder)):
        decoder.layers[index] = _LeanLayer(layer)


_MODULES: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    llama.LlamaModel: (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    mistral.MistralModel: (
        mistral.MistralDecoderLayer,
        mistral.MistralAttention,
        mistral.MistralMLP,
        mistral.MistralRMSNorm,
    ),
    qwen2.Qwen2Model: (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    qwen3.Qwen3Model: (qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
}
"""Each family's decoder, and the types of its layer, attention, MLP and norms."""


def _is_recognised(decoder: llama.LlamaModel) -> bool:
    types = _MODULES.get(type(decoder))
    if types is None or type(decoder.norm) is not types[3]:
        return False
    return all(_is_plain(layer, types) for layer in _layers(decoder))


def _layers(decoder: llama.LlamaModel) -> list[llama.LlamaDecoderLayer]:
    """The layers; the families are copies of Llama's code, so its types stand for all of them."""
    return cast("list[llama.LlamaDecoderLayer]", list(decoder.layers))


def _is_plain(layer: llama.LlamaDecoderLayer, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether the layer is made of the family's own modules and asks for nothing that the lean forward leaves out."""
    parts = (layer, layer.self_attn, layer.mlp, layer.input_layernorm)
    if tuple(map(type, parts)) != types or type(layer.post_attention_layernorm) is not types[3]:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    is_silu = isinstance(mlp.act_fn, SiLUActivation | nn.SiLU)
    return is_silu and window is None and all(type(linear) is nn.Linear for linear in linears)


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

    def __init__(self, rotary: llama.LlamaRotaryEmbedding) -> None:
        super().__init__()
        self._rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine and the signed sine, each [num_rows, 1, head_dim]."""
        cos, sin = self._rotary(x, position_ids=position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)


class _LeanLayer(nn.Module):
    """A decoder layer over packed rows."""

    def __init__(self, layer: llama.LlamaDecoderLayer) -> None:
        super().__init__()
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
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        return self._down.forward_add(F.silu(gate).mul_(up), hidden).unsqueeze(0)

    def _attend(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        # [num_rows, hidden_size] -> [num_rows, num_heads * head_dim]
        qkv = self._qkv(self._input_norm(hidden)).unflatten(-1, (-1, self._head_dim))
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
