"""A tiny GGUF model inside a tiny wheel, as llama.cpp writes the one and PyPI serves the other."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import PreTrainedModel

from dendrite.engine.checkpoint import file_sha256
from dendrite.engine.registry import KnownModel
from dendrite.engine.wheels import WheelFile
from tests.models_zoo import CHAT_TEMPLATE, CONTEXT_LENGTH, tiny_config, tiny_model, tiny_tokenizer

NAME = "tiny-model"
REPO = "nobody/tiny-model"
NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, HIDDEN = 4, 2, 2, 32

HUB_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class TinyWheel:
    """A wheel in a folder that pip can be pointed at, and the model that is in it."""

    folder: Path
    known: KnownModel
    model: PreTrainedModel
    """The model before it was written to GGUF, float32."""


def make_wheel(folder: Path, *, quantized: bool = False) -> TinyWheel:
    """Write a random llama to GGUF, and that into a wheel in `folder`."""
    config = tiny_config(
        "llama", num_hidden_layers=NUM_LAYERS, intermediate_size=64, vocab_size=len(tiny_tokenizer()), head_dim=None
    )
    model = tiny_model(config)
    gguf = write_gguf(folder / "tiny.gguf", model, quantized=quantized)
    wheel = folder / "tiny_model_wheel-1.0-py3-none-any.whl"
    dist_info = "tiny_model_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
        archive.writestr(f"{dist_info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-wheel\nVersion: 1.0\n")
        archive.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist_info}/RECORD", "")
    source = WheelFile(
        requirement="tiny-model-wheel==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=file_sha256(wheel),
        member="tiny/tiny.gguf",
        member_sha256=file_sha256(gguf),
    )
    gguf.unlink()
    return TinyWheel(folder, KnownModel(NAME, "0 M", REPO, source), model)


def write_gguf(path: Path, model: PreTrainedModel, *, quantized: bool) -> Path:
    """Write the model as llama.cpp's converter does: rope's pairs side by side, norms in float32."""
    writer = GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, weight in model.state_dict().items():
        gguf_name, values = _as_gguf(name, weight)
        if quantized and values.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(name: str, weight: torch.Tensor) -> tuple[str, npt.NDArray[np.float32]]:
    values: npt.NDArray[np.float32] = weight.numpy()
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name], values
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = NUM_HEADS if part == "self_attn.q_proj" else NUM_KV_HEADS
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, HIDDEN)
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return f"blk.{layer}.{HUB_TO_GGUF[part]}.weight", values


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(_merges())
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges() -> list[str]:
    import json

    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    return [" ".join(pair) for pair in model["merges"]]
