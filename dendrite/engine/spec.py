"""What the torch-free rooms know about a model: its shape, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model's dimensions, read once from its configuration."""

    name: str
    num_layers: int
    num_heads: int
    """Query heads of a layer."""
    num_kv_heads: int
    """Key and value heads of a layer; divides `num_heads`."""
    head_dim: int
    hidden_size: int
    """Width of the final hidden state, the input of the language-model head."""
    vocab_size: int
    """Rows of the head: the width of the logits, padding tokens included."""
    context_length: int
    """The most tokens a path may hold."""
    dtype: str
    """What weights and K/V are kept in: "float32", "bfloat16" or "float16"."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K/V that one token takes over all layers."""
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
