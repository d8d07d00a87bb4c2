"""The fused forward computes what Transformers' own modules do, and nothing is kept twice."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dendrite.engine.attention.interface import ATTENTION_NAME, register_attention
from dendrite.engine.attention.reference import ReferenceAttention
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.runner import TorchRunner
from tests.engine.packed_tree import PackedTree, plain, spec_of
from tests.models_zoo import EXACT, LLAMA3_ROPE, tiny_config, tiny_model

if TYPE_CHECKING:  # importing this chooses between the interpreter and the compiler, which conftest does first
    from dendrite.engine.kernels.few_rows import Cut

FUSED: dict[str, dict[str, object]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
}
"""Small enough for an interpreter; between them, biases, head norms, tied weights, odd widths and scaled rope."""


def fused(model: PreTrainedModel) -> bool:
    """Apply the pass; whether it took the model."""
    from dendrite.engine.passes.fused import make_fused

    kind = type(model.get_decoder().layers[0])
    make_fused(model)
    return type(model.get_decoder().layers[0]) is not kind


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_model_runs_a_tree_as_transformers_runs_its_paths(family: str, device: torch.device) -> None:
    """Random trees in random chunks: every path's hidden states are those of a plain forward."""
    register_attention()
    config = tiny_config(family, num_hidden_layers=2, **FUSED[family])
    reference = tiny_model(copy.deepcopy(config))
    model = tiny_model(config, device=device)
    spec = spec_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    assert fused(model)
    runner = TorchRunner(model, spec, kv_memory=1601 * spec.bytes_per_token, block_size=4, attention=ReferenceAttention)
    tree = PackedTree(runner, random.Random(family), depth=1)
    tree.run(23)
    for tokens, hidden in tree.paths():
        expected, logits = plain(reference, tokens)
        torch.testing.assert_close(hidden.cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runner.logits(hidden).cpu(), logits, rtol=1e-3, atol=1e-3)


def test_one_row_through_the_kernel_changes_nothing(device: torch.device) -> None:
    """With its products in the kernel for one row, steps of one row and of several compute the same."""
    from dendrite.engine.kernels.linear import Tiling

    register_attention()
    config = tiny_config("qwen2", num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_key_value_heads=1)
    reference = tiny_model(copy.deepcopy(config))
    model = tiny_model(config, device=device)
    spec = spec_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    assert fused(model)
    for layer in model.get_decoder().layers:
        for projection in layer.projections:
            projection.tiling = Tiling(16, 32, 4)
    runner = TorchRunner(model, spec, kv_memory=801 * spec.bytes_per_token, block_size=4, attention=ReferenceAttention)
    tree = PackedTree(runner, random.Random(5), depth=1)
    tree.run(1 if device.type == "cuda" else 15)
    tree.root.children.append(tree._grow(len(tree.root.tokens), 0))
    tree.run(1)
    for tokens, hidden in tree.paths():
        torch.testing.assert_close(hidden.cpu(), plain(reference, tokens)[0], rtol=1e-4, atol=1e-4)


def linear_in_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut, *, is_gated: bool = False) -> Tensor:
    """What the kernel for few rows computes."""
    result = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if is_gated:
        gate, up = result.chunk(2, dim=1)
        result = F.silu(gate) * up
    return result.to(x.dtype)


def sums_in_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, cut: Cut) -> Tensor:
    """The same in parts."""
    parts = zip(x.float().chunk(cut.num_splits, dim=1), weight.float().chunk(cut.num_splits, dim=1), strict=True)
    sums = torch.stack([F.linear(*part) for part in parts])
    sums[0] += bias.float() if bias is not None else 0.0
    return sums


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_few_rows_through_the_kernel_change_nothing(
    family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all products cut, in parts where they may be, a step's hidden states are those through the BLAS."""
    from dendrite.engine.kernels.few_rows import Cut
    from dendrite.engine.kernels.nvrtc import can_compile
    from dendrite.engine.passes import stream

    if not can_compile(device):  # no interpreter runs CUDA C++; what stands around the kernel is tested all the same
        monkeypatch.setattr(stream, "few_rows_linear", linear_in_pytorch)
        monkeypatch.setattr(stream, "few_rows_sums", sums_in_pytorch)
    register_attention()
    config = tiny_config(family, num_hidden_layers=2, hidden_size=128, intermediate_size=192, head_dim=32)
    found = []
    for is_cut in (False, True):
        model = tiny_model(copy.deepcopy(config), device=device, dtype=torch.bfloat16)
        spec = replace(spec_of(model), dtype="bfloat16")
        model.set_attn_implementation(ATTENTION_NAME)
        assert fused(model)
        for layer in model.get_decoder().layers:
            for projection in layer.projections:
                cut = Cut(1, 1, 3, num_splits=1 if projection.is_gated else 2)
                projection.tiling, projection.cuts = None, dict.fromkeys(range(9), cut) if is_cut else {}
        memory = 801 * spec.bytes_per_token
        runner = TorchRunner(model, spec, kv_memory=memory, block_size=4, attention=ReferenceAttention)
        tree = PackedTree(runner, random.Random(3), depth=1)
        tree.run(19)
        found.append(torch.cat([hidden.float() for _, hidden in tree.paths()]))
    assert torch.linalg.vector_norm(found[1] - found[0]) < 0.05 * torch.linalg.vector_norm(found[0])


WIDE_ENOUGH: dict[str, dict[str, object]] = {
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt2": {},
}
"""For a block of the kernel for one row."""


@pytest.mark.parametrize("family", WIDE_ENOUGH)
def test_products_are_chosen_with_the_attention_between_them(family: str, device: torch.device) -> None:
    """All layers run over keys in the pool, which is empty again afterwards; what is not fused is left alone."""
    from dendrite.engine.passes.choosing import choose_products
    from dendrite.engine.passes.fused import FusedLayer, make_fused

    register_attention()
    model = tiny_model(
        tiny_config(family, num_hidden_layers=2, **WIDE_ENOUGH[family]), device=device, dtype=torch.bfloat16
    )
    spec = replace(spec_of(model), dtype="bfloat16")
    model.set_attn_implementation(ATTENTION_NAME)
    make_fused(model)
    pool = KVPool(spec, num_blocks=9, block_size=4, device=device)
    decoder, seconds = model.get_decoder(), count(1000, -5)

    def measure(run: Callable[[], object]) -> float:
        assert pool.data[:, :, :, pool.block_size :].abs().amax(3).amin() > 0, "there is something to attend to"
        run()
        return next(seconds)

    choose_products(decoder, ReferenceAttention(pool, spec), measure)
    assert not pool.data.any()
    layers = [layer for layer in decoder.modules() if isinstance(layer, FusedLayer)]
    assert bool(layers) == (family == "qwen3")
    assert all(projection.tiling is not None for layer in layers for projection in layer.projections)


def test_fused_layers_keep_no_second_copy(device: torch.device) -> None:
    """Of the layers' parameters none is left: their weights live in the merged ones alone."""
    model = tiny_model(EXACT["qwen3"](), device=device)
    assert fused(model)
    assert [name for name, _ in model.named_parameters()] == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("change", ["activation", "window", "subclass", "family"])
def test_unknown_structure_is_left_alone(change: str, device: torch.device) -> None:
    """Layers that differ in anything the fused forward does not know keep their own forward."""
    changes: dict[str, dict[str, object]] = {"activation": {"hidden_act": "gelu"}, "window": {"sliding_window": 8}}
    config = tiny_config("mistral", **{"sliding_window": None, **changes.get(change, {})})
    model = tiny_model(EXACT["gemma"]() if change == "family" else config, device=device)
    if change == "subclass":
        layer = model.get_decoder().layers[1]
        layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {})
    assert not fused(model)
