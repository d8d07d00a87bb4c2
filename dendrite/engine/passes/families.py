"""Which decoders have Llama's structure: Llama, Mistral, Qwen2 and Qwen3, and whatever shares their code.

A family is recognised by the exact types of its modules: one that inherits a layer and changes it is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

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


def is_recognised(decoder: llama.LlamaModel) -> bool:
    """Whether every layer can be exchanged for a leaner one that computes the same."""
    types = _MODULES.get(type(decoder))
    if types is None or type(decoder.norm) is not types[3]:
        return False
    return all(_is_plain(_layer(decoder, index), types) for index in range(len(decoder.layers)))


def take_layers(decoder: llama.LlamaModel) -> Iterator[llama.LlamaDecoderLayer]:
    """The decoder's layers, each out of it already: what is made of one by one is never in memory twice as a whole."""
    for index in range(len(decoder.layers)):
        layer = _layer(decoder, index)
        decoder.layers[index] = nn.Identity()
        yield layer
        del layer


def _layer(decoder: llama.LlamaModel, index: int) -> llama.LlamaDecoderLayer:
    """A layer; the families are copies of Llama's code, so its types stand for all of them."""
    return cast("llama.LlamaDecoderLayer", decoder.layers[index])


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
