"""What is compiled computes what its source says, and takes Python's lock once for all layers of a step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dendrite.engine import compiled as compiled_module
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.cpu_tiles import attend
from dendrite.engine.compiled import compiled
from tests.engine.attention.conformance import make_case
from tests.engine.attention.test_conformance import SHAPES
from tests.engine.packed_tree import PackedTree, make_runner
from tests.models_zoo import EXACT, tiny_config

LEAN = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def no_torchscript(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A PyTorch that has dropped it."""
    compiled_module._compiled.cache_clear()
    monkeypatch.delattr(torch.jit, "script")
    yield
    compiled_module._compiled.cache_clear()


class Counting(TorchFunctionMode):
    """Counts what Python asks PyTorch to do; each time it gives the lock up."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs if isinstance(kwargs, dict) else {}))


def states(family: str) -> list[Tensor]:
    """Final hidden states of a random tree's paths, in chunks that decode and prefill."""
    runner = make_runner(EXACT[family]())
    tree = PackedTree(runner, random.Random(family))
    tree.run(23)
    return [hidden for _, hidden in tree.paths()]


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_the_same_bits_compiled(name: str) -> None:
    """On every shape of tree, scattered blocks included."""
    case = make_case(SHAPES[name], random.Random(name), block_size=8, is_scattered=True)
    backend = TreeAttention(case.pool, case.spec)
    backend.prepare(case.plan)
    query = torch.randn(case.plan.num_rows, case.spec.num_heads, case.spec.head_dim)
    expected = attend(backend.tiles, case.pool.layers[0], query, 0.3)
    assert torch.equal(backend.run(0, query, 0.3), expected)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("family", LEAN)
def test_layers_are_the_same_bits_without_torchscript(family: str, request: pytest.FixtureRequest) -> None:
    """A PyTorch without it runs the functions themselves."""
    expected = states(family)
    request.getfixturevalue("no_torchscript")
    assert compiled(attend) is attend
    for ours, theirs in zip(states(family), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says so."""

    def unread(_: object) -> object:
        raise OSError("could not get source code")

    def double(x: Tensor) -> Tensor:
        return x + x

    monkeypatch.setattr(torch.jit, "script", unread)
    with pytest.warns(UserWarning, match="double runs operator by operator"):
        assert compiled(double) is double


def test_the_number_of_layers_does_not_count() -> None:
    """A step of eight layers asks PyTorch from Python for as much as one of two; all layers are one call."""
    counts = []
    for num_layers in (2, 8):
        runner = make_runner(tiny_config("llama", num_hidden_layers=num_layers))
        tree = PackedTree(runner, random.Random(1), depth=1)
        with Counting() as counting:
            tree.run(1000)
        counts.append(counting.calls)
    assert counts[0] == counts[1]
    assert counts[0]["rms_norm"] == 1  # the final one
