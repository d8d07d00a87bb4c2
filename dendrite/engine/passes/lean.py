"""The decoder of Llama-like models in few operators: Llama, Mistral, Qwen2 and Qwen3, and whatever shares their code.

A decoding step on the CPU is hundreds of small operators, each of which costs microseconds before it computes anything
and gives the interpreter's lock away once. So the layers become one module that runs them all as one compiled call,
where the attention is the CPU's own; with another, or where rows must not depend on each other's number, it runs the
same functions layer by layer.

`families` says which models these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.compiled import compiled
from dendrite.engine.passes.families import is_recognised, take_layers
from dendrite.engine.passes.lean_layer import LayerWeights, StepRows, finish, kv_of, project, queries_of, run_layers
from dendrite.engine.passes.linear import merged, pack
from dendrite.engine.passes.steady import SteadyRotary, row_pieces


def make_lean(model: PreTrainedModel, *, steady: bool = False) -> None:
    """Replace the layers of a recognised decoder, all or none, freeing each layer's weights as it goes.

    With `steady` a row's bits do not depend on how many rows there are; see `steady`.
    """
    decoder = model.get_decoder()
    if not is_recognised(decoder):
        return
    decoder.rotary_emb = _LeanRotary(SteadyRotary(decoder.rotary_emb) if steady else decoder.rotary_emb)
    decoder.norm = _LeanNorm(decoder.norm)
    layers = [_weights_of(layer, steady=steady) for layer in take_layers(decoder)]
    decoder.layers = nn.ModuleList([LeanLayers(layers, steady=steady)])


class LeanLayers(nn.Module):
    """All layers of a decoder, over packed rows."""

    def __init__(self, layers: Sequence[LayerWeights], *, steady: bool) -> None:
        super().__init__()
        self._layers = list(layers)
        self._steady = steady
        self._run_layers, self._project, self._finish = compiled(run_layers), compiled(project), compiled(finish)

    def first(self) -> LeanLayers:
        """The first of them alone."""
        return LeanLayers(self._layers[:1], steady=self._steady)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        dendrite_step: AttentionStep,
        **_: object,
    ) -> Tensor:
        """Map hidden states [1, num_rows, hidden_size] to the same; other keywords are those that attention ignores."""
        hidden, backend = hidden_states[0], dendrite_step.backend
        if isinstance(backend, TreeAttention) and not self._steady:
            rows = StepRows(*position_embeddings, dendrite_step.slots, backend.tiles)
            hidden = self._run_layers(self._layers, hidden, rows, dendrite_step.all_kept(len(self._layers)))
        else:
            hidden = self._layer_by_layer(hidden, position_embeddings, dendrite_step)
        return hidden.unsqueeze(0)

    def _layer_by_layer(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        pieces: list[int] = []
        if self._steady:
            width = sum(self._layers[0].down.widths)
            pieces = row_pieces(len(hidden), width, num_threads=torch.get_num_threads())
        for index, layer in enumerate(self._layers):
            qkv = self._project(layer, hidden, *rotation)
            attended = step.attend(index, queries_of(layer, qkv), kv_of(layer, qkv), layer.scale)
            hidden = self._finish(layer, attended, hidden, pieces)
        return hidden


def _weights_of(layer: llama.LlamaDecoderLayer, *, steady: bool) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        epsilon=layer.input_layernorm.variance_epsilon,
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=merged([attention.q_proj, attention.k_proj, attention.v_proj], steady=steady),
        head_norms=_head_norms(attention) if hasattr(attention, "q_norm") else None,
        out=pack(attention.o_proj.weight, attention.o_proj.bias, steady=steady),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=merged([mlp.gate_proj, mlp.up_proj], steady=steady),
        down=pack(mlp.down_proj.weight, mlp.down_proj.bias, steady=steady),
    )


def _head_norms(attention: llama.LlamaAttention) -> Tensor:
    """The weights of the norms of queries and keys (Qwen3), [num_heads + num_kv_heads, head_dim]."""
    query_norm, key_norm = cast("tuple[llama.LlamaRMSNorm, ...]", (attention.q_norm, attention.k_norm))
    num_kv_heads = attention.k_proj.out_features // attention.head_dim
    num_heads = num_kv_heads * attention.num_key_value_groups
    query, key = query_norm.weight.detach(), key_norm.weight.detach()
    return torch.cat((query.expand(num_heads, -1), key.expand(num_kv_heads, -1)))


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
