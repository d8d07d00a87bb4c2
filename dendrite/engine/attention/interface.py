"""The attention function that Transformers' modules call, registered under the name `dendrite`.

No mask function is registered with it: Transformers then makes no mask, and who reads what is the plan's to say. What
the function is not told to apply it must not ignore in silence, so its keywords are a closed set.
"""

from __future__ import annotations

from torch import Tensor, nn, stack
from transformers import AttentionInterface

from dendrite.engine.attention.base import AttentionStep
from dendrite.engine.errors import ModelError

ATTENTION_NAME = "dendrite"
STEP_KEYWORD = "dendrite_step"

_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}
)
"""Keywords that models pass on and that change nothing here: positions are in the plan, nothing else is returned."""


def register_attention() -> None:
    """Make `attn_implementation="dendrite"` known to Transformers; may be called again."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_rows, head_dim]
    key: Tensor,  # [1, num_kv_heads, num_rows, head_dim]
    value: Tensor,  # [1, num_kv_heads, num_rows, head_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    dendrite_step: AttentionStep | None = None,
    **keywords: object,
) -> tuple[Tensor, None]:
    if dendrite_step is None:
        raise ModelError(f"{type(module).__name__} was run without a plan: the model does not pass keywords on")
    if attention_mask is not None or dropout != 0.0 or is_causal is False:
        raise ModelError(f"{type(module).__name__} asks for a mask, dropout or bidirectional attention: not supported")
    _check_keywords(module, keywords)
    _check_shapes(module, query, key, value)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    kv = stack((key[0], value[0])).permute(2, 0, 1, 3)
    output = dendrite_step.attend(layer, query[0].transpose(0, 1), kv, scale)
    return output.unsqueeze(0), None


def _check_keywords(module: nn.Module, keywords: dict[str, object]) -> None:
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in _WITHOUT_EFFECT)
    if unknown:
        raise ModelError(f"{type(module).__name__} passes {', '.join(unknown)} to attention: not supported yet")


def _check_shapes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or key.shape != value.shape:
        raise ModelError(
            f"{type(module).__name__} attends with shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}: keys and values of one packed row each, of equal width, are supported"
        )
