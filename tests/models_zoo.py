"""Tiny random models of many families and a tiny real tokenizer, made on the spot: nothing is downloaded.

Weights are drawn wide (a standard deviation of 0.3), because with the usual 0.02 attention hardly moves the logits and
a wrong mask would go unseen.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 320
CONTEXT_LENGTH = 256
WIDE = 0.3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DIMENSIONS: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": WIDE,
}
GPT2_DIMENSIONS: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": CONTEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": WIDE,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}

EXACT: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tiny_config("llama"),
    "llama-llama3-rope": lambda: tiny_config("llama", rope_parameters=LLAMA3_ROPE),
    "llama-yarn-rope": lambda: tiny_config("llama", rope_parameters=YARN_ROPE),
    "llama-tied": lambda: tiny_config("llama", tie_word_embeddings=True),
    "qwen2": lambda: tiny_config("qwen2"),
    "qwen3": lambda: tiny_config("qwen3"),
    "mistral": lambda: tiny_config("mistral", sliding_window=None),
    "gemma": lambda: tiny_config("gemma"),
    "phi": lambda: tiny_config("phi", num_key_value_heads=4),
    "gpt2": lambda: family_config("gpt2", GPT2_DIMENSIONS),
    "olmo2": lambda: tiny_config("olmo2"),
    "qwen2-moe": lambda: tiny_config("qwen2_moe", **EXPERTS),
}
"""Families that run exactly, by name."""


def tiny_config(model_type: str, **overrides: object) -> PreTrainedConfig:
    """Return a configuration of a few thousand weights for a family that names its dimensions as Llama does."""
    return family_config(model_type, {**DIMENSIONS, **overrides})


def family_config(model_type: str, values: Mapping[str, object]) -> PreTrainedConfig:
    """Return a family's configuration with these values and its own defaults."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(values))
    return config


def tiny_model(
    config: PreTrainedConfig, *, seed: int = 0, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a model with random weights, the same for equal seeds: those of float32, in `dtype`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    placed: PreTrainedModel = model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # its `self` is mistyped
    return placed


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCAB_SIZE` tokens or fewer, with a chat template; it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the tree branches and the branch goes on and on, step by step\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> Path:
    """Save a random model and the tokenizer into `folder`, as any model's folder looks; returns the folder."""
    tiny_model(config, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
