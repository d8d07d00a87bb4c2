"""Models that are a shape and nothing else: random weights, made where they will run, and no text.

What a decode step costs depends on a model's dimensions, not on what it has learnt; so an 8B model can be measured
without 16 GB of weights to fetch. Peers make the same shape from the same `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from llguidance import LLTokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dendrite.engine.attention.interface import ATTENTION_NAME, register_attention
from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.messages import Message

COMMON: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
}
SHAPES: dict[str, dict[str, object]] = {
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
    "0.6b": {  # a Llama with the dimensions of Qwen3-0.6B, without its norms of queries and keys
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
    },
    "tiny": {  # no real model's: to see the command work
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
}


def config_of(shape: str) -> LlamaConfig:
    """The configuration of a shape.

    Raises:
        ModelError: there is no such shape.
    """
    return LlamaConfig.from_dict(_fields(shape))


def write_config(shape: str, folder: Path) -> None:
    """Write the shape's `config.json`, which is all that peers need to make it.

    Raises:
        ModelError: there is no such shape.
    """
    (folder / "config.json").write_text(json.dumps(_fields(shape), indent=2), encoding="utf-8")


def random_model(config: LlamaConfig, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """Weights drawn on the device, in the dtype: normal with a standard deviation of 0.02, norms of 1.

    Nothing passes through the host's memory, so an 8B shape takes as long as the device needs to draw it.
    """
    register_attention()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION_NAME
        )
    model.eval().requires_grad_(requires_grad=False)
    return model


class WordlessTokenizer:
    """For programs that give and take token ids: text goes nowhere, and a token's text is a full stop.

    The engine turns every token into text as it comes; peers are told not to (`detokenize=False`), so this costs
    next to nothing.
    """

    bos_token_id: int | None = None
    byte_token_ids: frozenset[int] = frozenset()
    chat_template = ""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Refuse: there are no words.

        Raises:
            RequestError: always.
        """
        raise RequestError("a shape with random weights has no vocabulary: give token ids")

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """A full stop a token."""
        return "." * len(token_ids)

    def for_grammars(self, vocab_size: int) -> LLTokenizer:
        """Refuse: there are no words.

        Raises:
            RequestError: always.
        """
        raise RequestError("a shape with random weights has no vocabulary: nothing can be constrained")

    def render(self, messages: Sequence[Message], **_: object) -> list[int]:
        """Refuse: there are no words.

        Raises:
            ModelError: always.
        """
        raise ModelError("a shape with random weights has no chat template: give token ids")


def _fields(shape: str) -> dict[str, object]:
    if shape not in SHAPES:
        raise ModelError(f"there is no shape {shape!r}: give {', '.join(SHAPES)}")
    return COMMON | SHAPES[shape]
