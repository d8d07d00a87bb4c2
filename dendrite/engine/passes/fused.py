"""The forward of Llama-like layers on a CUDA device in few kernels, all of which a CUDA graph can capture.

Attention aside, a layer is:

    add + norm   qkv   head norms + rope + K/V append   (attention)   out   add + norm   gate|up   silu * mul   down

With one row the norm, the activation and the residual add may be parts of the products' kernels, with a few the
activation is (`stream`); `choosing` says which. Else what a layer adds to the residual stream is added by the norm that
follows, the next layer's or the final one. So what goes from layer to layer is no tensor but a `Stream`; the decoder's
own forward only hands it on.
`families` says which models these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.kernels.rotary import rotate_and_keep
from dendrite.engine.passes.families import is_recognised, take_layers
from dendrite.engine.passes.stream import Norm, Projection, Stream
from dendrite.engine.structure import context_length

TABLE_ROWS = 4096
"""Positions whose cosines are computed at a time when the table is made."""


def make_fused(model: PreTrainedModel) -> None:
    """Replace the layers of a recognised decoder, all or none, freeing each layer's weights as it goes."""
    decoder = model.get_decoder()
    if not is_recognised(decoder):
        return
    decoder.rotary_emb = RotaryTable(decoder.rotary_emb, context_length(decoder.config), model.dtype)
    decoder.norm = _FinalNorm(decoder.norm)
    decoder.layers = nn.ModuleList([FusedLayer(layer) for layer in take_layers(decoder)])


@dataclass(frozen=True)
class _Rotation:
    """How a step's rows are rotated."""

    cos: Tensor
    """[context_length, head_dim / 2], row p for position p, in the model's dtype as Transformers rounds it."""
    sin: Tensor
    positions: Tensor
    """[num_rows]"""


class RotaryTable(nn.Module):
    """The model's own rotary embedding, computed once for every position: in a step it costs no kernel."""

    def __init__(self, rotary: llama.LlamaRotaryEmbedding, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = rotary.inv_freq.device
        half = rotary.inv_freq.numel()
        self._cos = torch.empty((num_positions, half), dtype=dtype, device=device)
        self._sin = torch.empty_like(self._cos)
        like = torch.empty((), dtype=dtype, device=device)
        for positions in torch.arange(num_positions, device=device).split(TABLE_ROWS):
            cos, sin = rotary(like, position_ids=positions[None])  # each half of these is the same
            self._cos[positions] = cos[0, :, :half]
            self._sin[positions] = sin[0, :, :half]

    def forward(self, _: Tensor, position_ids: Tensor) -> _Rotation:
        """The table with the rows' positions [1, num_rows]."""
        return _Rotation(self._cos, self._sin, position_ids[0])


class _FinalNorm(nn.Module):
    """Where the stream becomes a tensor again."""

    def __init__(self, norm: llama.LlamaRMSNorm) -> None:
        super().__init__()
        self._norm = Norm(norm)

    def forward(self, stream: Stream) -> Tensor:
        """The normed hidden states, [1, num_rows, hidden_size]."""
        return self._norm(stream).unsqueeze(0)


class FusedLayer(nn.Module):
    """A decoder layer over packed rows."""

    def __init__(self, layer: llama.LlamaDecoderLayer) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._layer_idx: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._head_norms = _head_norms(attention)
        self._input_norm = Norm(layer.input_layernorm)
        self._qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = Projection([attention.o_proj])
        self._mlp_norm = Norm(layer.post_attention_layernorm)
        self._gate_up = Projection([mlp.gate_proj, mlp.up_proj], is_gated=True)
        self._down = Projection([mlp.down_proj])

    def forward(
        self,
        hidden_states: Tensor | Stream,
        *,
        position_embeddings: _Rotation,
        dendrite_step: AttentionStep,
        **_: object,
    ) -> Stream:
        """Take what the layer before gave, or the embeddings [1, num_rows, hidden_size], which are overwritten."""
        stream = hidden_states
        if isinstance(stream, Tensor):
            stream = Stream(stream[0].contiguous(), None)
        qkv = self._qkv.of_normed(stream, self._input_norm)
        self._out.add_to(stream, self._attend(qkv, position_embeddings, dendrite_step))
        self._down.add_to(stream, self._gate_up.of_normed(stream, self._mlp_norm))
        return stream

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The products, in the order in which they run."""
        return self._qkv, self._out, self._gate_up, self._down

    def _attend(self, qkv: Tensor, rotation: _Rotation, step: AttentionStep) -> Tensor:
        # -> [num_rows, num_heads * head_dim]
        query = rotate_and_keep(
            qkv,
            rotation.cos,
            rotation.sin,
            positions=rotation.positions,
            slots=step.slots,
            kept=step.kept(self._layer_idx),
            head_norms=self._head_norms,
        )
        return step.attend_kept(self._layer_idx, query, self._scale).flatten(1)


def _head_norms(attention: llama.LlamaAttention) -> tuple[Tensor, Tensor, float] | None:
    if not hasattr(attention, "q_norm"):
        return None
    query_norm, key_norm = cast("tuple[llama.LlamaRMSNorm, ...]", (attention.q_norm, attention.k_norm))
    return query_norm.weight.detach(), key_norm.weight.detach(), query_norm.variance_epsilon
