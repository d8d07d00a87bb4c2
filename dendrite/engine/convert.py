"""A GGUF file to a folder that Transformers loads as if it came from the hub.

Transformers can read GGUF too, but only with `accelerate` installed, and it does not know this tokenizer's
pre-tokenisation, so that digits after spaces come out as other tokens than the model was trained on. What is read here
is exactly what is known to be right: the llama architecture without rope scaling, and SmolLM's byte-level BPE.
Anything else is refused. Needs neither torch nor Transformers.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dendrite.engine.checkpoint import CONFIG, WEIGHTS
from dendrite.engine.errors import ModelError
from dendrite.engine.progress import SetDone

Array = npt.NDArray[Any]

CONTROL_TOKEN = 3
"""llama.cpp's type number of a special token."""

WHOLE_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, folder: Path, *, done: SetDone) -> None:
    """Write `config.json`, `generation_config.json`, the tokenizer's files and bfloat16 weights into `folder`.

    bfloat16 is what the model was published in; it halves the folder, and what it rounds off is a tenth or less of
    what the file's 4-bit blocks already lost.

    Args:
        source: the GGUF file.
        folder: an existing, empty folder.
        done: called with the bytes of the file dealt with so far.

    Raises:
        ModelError: the file is damaged or of a kind that this cannot convert exactly.
    """
    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{source.name} is not a readable GGUF file ({error})") from error
    metadata = GGUFMetadata(reader)
    _refuse_unknown(metadata)
    _write_json(folder / CONFIG, _config(metadata, tied=not _has_own_head(reader)))
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_weights(reader, metadata, folder / WEIGHTS, done=done)


class GGUFMetadata:
    """Typed access to a GGUF file's keys; a missing or mistyped key is a `ModelError` that names it."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def integer(self, key: str) -> int:
        """A whole number."""
        return int(self._get(key, int))

    def number(self, key: str) -> float:
        """A 32-bit float, as the decimal it was written from (1e-05, not 9.99999974e-06)."""
        return float(f"{self._get(key, float):.7g}")

    def text(self, key: str) -> str:
        """A string."""
        return str(self._get(key, str))

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return list(self._get(key, list))

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        return [int(item) for item in self._get(key, list)]

    def _get(self, key: str, kind: type) -> Any:  # noqa: ANN401  (the public methods above give it its type)
        if key not in self._fields:
            raise ModelError(f"the GGUF file has no {key}")
        value = self._fields[key].contents()
        if not isinstance(value, kind):
            raise ModelError(f"the GGUF file's {key} is {type(value).__name__}, not {kind.__name__}")
        return value


def _refuse_unknown(metadata: GGUFMetadata) -> None:
    known = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for key, value in known.items():
        if metadata.text(key) != value:
            raise ModelError(f"only GGUF files with {key} = {value} can be converted, not {metadata.text(key)}")
    if "llama.rope.scaling.type" in metadata and metadata.text("llama.rope.scaling.type") != "none":
        raise ModelError("GGUF files with rope scaling cannot be converted: load the model's safetensors instead")


def _has_own_head(reader: GGUFReader) -> bool:
    return any(tensor.name == "output.weight" for tensor in reader.tensors)


def _config(metadata: GGUFMetadata, *, tied: bool) -> dict[str, object]:
    hidden_size = metadata.integer("llama.embedding_length")
    num_heads = metadata.integer("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer("llama.feed_forward_length"),
        "max_position_embeddings": metadata.integer("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": metadata.integer("llama.block_count"),
        "num_key_value_heads": metadata.integer("llama.attention.head_count_kv"),
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.number("llama.rope.freq_base")},
        "tie_word_embeddings": tied,
        "vocab_size": metadata.integer("llama.vocab_size"),
        **_token_ids(metadata),
    }


def _generation_config(metadata: GGUFMetadata) -> dict[str, object]:
    return {"_from_model_config": True, **_token_ids(metadata)}


def _token_ids(metadata: GGUFMetadata) -> dict[str, int]:
    return {
        "bos_token_id": metadata.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.integer("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer(metadata: GGUFMetadata) -> Tokenizer:
    """SmolLM's tokenizer: every digit stands alone, then GPT-2's split and byte-level BPE."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    merges = [_pair(merge) for merge in metadata.texts("tokenizer.ggml.merges")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.integers("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _tokenizer_config(metadata: GGUFMetadata) -> dict[str, object]:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    return {
        # Not GPT2Tokenizer, which the hub's file names: that class may replace the split of digits by GPT-2's own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[metadata.integer("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[metadata.integer("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[metadata.integer("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[metadata.integer("tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer("llama.context_length"),
        "chat_template": metadata.text("tokenizer.chat_template"),
    }


def _write_weights(reader: GGUFReader, metadata: GGUFMetadata, path: Path, *, done: SetDone) -> None:
    """Write a safetensors file tensor by tensor, so that no more than one is in memory."""
    heads = {
        "attn_q": metadata.integer("llama.attention.head_count"),
        "attn_k": metadata.integer("llama.attention.head_count_kv"),
    }
    bytes_done = 0
    with path.open("wb") as file:
        file.write(_safetensors_header(reader))
        for tensor in reader.tensors:
            values: Array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise ModelError(f"{tensor.name} of the GGUF file holds numbers that are not finite")
            part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if part in heads:
                values = _split_halves(values, heads[part])
            file.write(_to_bfloat16(values).astype("<u2", copy=False).data)
            bytes_done += int(tensor.n_bytes)
            done(bytes_done)


def _safetensors_header(reader: GGUFReader) -> bytes:
    """The length, then the names, shapes and places of all tensors as JSON, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        end = offset + 2 * math.prod(shape)
        header[_hub_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hub_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in WHOLE_NAMES:
        return WHOLE_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ModelError(f"the GGUF file holds a tensor that a llama model does not have: {name}")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def _split_halves(weight: Array, num_heads: int) -> Array:
    """Reorder each head's rows from rope's neighbouring pairs (llama.cpp) to its two halves (Transformers).

        0 1 2 3 4 5   →   0 2 4 1 3 5

    `weight` is `[num_heads * head_dim, hidden_size]`.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _to_bfloat16(values: Array) -> Array:
    """Round finite float32 to bfloat16, to nearest, ties to even; bits in uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
