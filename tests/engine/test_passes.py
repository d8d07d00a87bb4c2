"""The passes change how fast a model is, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from dendrite.engine.passes import optimise
from dendrite.engine.passes.linear import FastLinear, linear, linear_add, merged, pack
from tests.models_zoo import EXACT, tiny_config, tiny_model

LEAN = ["llama", "llama-llama3-rope", "llama-tied", "mistral", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operators this small only wait for each other's threads, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def num_modules(model: PreTrainedModel, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 32, 130])
def test_packed_layers_compute_what_plain_ones_do(dtype: torch.dtype, has_bias: bool, num_rows: int) -> None:
    """A prepacked layer gives the plain one's result, with and without a residual, for any number of rows."""
    plain = nn.Linear(48, 80, bias=has_bias, dtype=dtype).requires_grad_(requires_grad=False)
    packed = pack(plain.weight, plain.bias)
    x, residual = torch.randn(num_rows, 48, dtype=dtype), torch.randn(num_rows, 80, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, packed), plain(x), rtol=tolerance, atol=tolerance)
        added = linear_add(x, packed, residual)
        torch.testing.assert_close(added, plain(x) + residual, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("in_features", [16, 700])
def test_a_packed_weight_can_be_looked_at(in_features: int) -> None:
    """Code that reads a layer's weight still finds it."""
    weight = torch.randn(24, in_features)
    torch.testing.assert_close(FastLinear(pack(weight, None)).weight, weight)


def test_long_sums_are_exact() -> None:
    """A wide float32 layer is no further from float64 than a plain one, with a bias and a residual."""
    weight, bias, x, residual = (torch.randn(*shape) for shape in [(64, 1536), (64,), (20, 1536), (20, 64)])
    exact = x.double() @ weight.double().T + bias + residual
    layer = pack(weight, bias)
    assert len(layer.parts) > 1
    error = (linear_add(x, layer, residual) - exact).square().mean()
    assert error <= 1.5 * (x @ weight.T + bias + residual - exact).square().mean()


def test_weights_that_cannot_be_packed_stay_plain() -> None:
    """A dtype without a native product keeps its weight and works the same way."""
    weight, bias = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    layer = pack(weight, bias)
    assert not layer.is_packed
    x, residual = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(linear_add(x, layer, residual), x @ weight.T + bias + residual)


def test_merged_layers_stand_side_by_side() -> None:
    """Layers over one input merge into one, biases included."""
    layers = [nn.Linear(16, width).requires_grad_(requires_grad=False) for width in (8, 4, 12)]
    x = torch.randn(5, 16)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        torch.testing.assert_close(linear(x, merged(layers)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", EXACT)
def test_no_plain_linear_layer_is_left(family: str) -> None:
    """Whatever the family, its linear layers are packed, the head included."""
    model = tiny_model(EXACT[family]())
    optimise(model)
    assert num_modules(model, nn.Linear) == 0
    assert num_modules(model, FastLinear) > 0


@pytest.mark.parametrize("family", LEAN)
def test_lean_layers_keep_no_second_copy(family: str) -> None:
    """Of a lean model's parameters only the embedding is left: the other weights live in their packed form alone."""
    model = tiny_model(EXACT[family]())
    optimise(model)
    assert [name for name, _ in model.named_parameters()] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("change", ["activation", "window", "subclass"])
def test_unknown_structure_is_left_alone(change: str) -> None:
    """Layers that differ in anything the lean forward does not know keep their own forward."""
    changes: dict[str, dict[str, object]] = {"activation": {"hidden_act": "gelu"}, "window": {"sliding_window": 8}}
    model = tiny_model(tiny_config("mistral", **{"sliding_window": None, **changes.get(change, {})}))
    layer = model.get_decoder().layers[1]
    if change == "subclass":
        layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {})
    kind = type(layer)
    optimise(model)
    assert num_modules(model, kind) == model.config.num_hidden_layers


def test_other_devices_are_left_alone() -> None:
    """A model that is not on the CPU stays as it is."""
    model = tiny_model(EXACT["llama"](), device=torch.device("meta"))
    before = num_modules(model, nn.Linear)
    optimise(model)
    assert num_modules(model, nn.Linear) == before
