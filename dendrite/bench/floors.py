"""The least time that a device needs for a case, from what it must move and compute.

A forward pass reads every weight once and every token's K/V once, however many branches share it; beside that stand the
products with the weights and with the keys. Whichever takes longer decides, for the weights and for attention apart:

    pass = max(bytes of weights / bandwidth, their products / rate) + max(bytes of K/V / bandwidth, its products / rate)

Nothing is added for launches, for Python, for sampling or norms, and the first token off a warm branch is free, since
its row may have been kept. So no engine reaches a floor; the quotient says how much of its time is something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from dendrite.bench.cases import CUE, Case, Decode, Fanout, FirstToken, Memory, MonteCarlo, Score, Thoughts


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device was measured to reach."""

    bytes_per_second: float
    """Of a copy on the device, reading and writing counted."""
    flops_per_second: float
    """Of bfloat16 matrix products of the shapes that occur here."""


RATES = {"H200": Rates(4.25e12, 600e12)}
"""A part of the device's name -> its rates."""

GATED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Layers of four projections and a gated MLP of three."""


def rates_of(device_name: str | None) -> Rates | None:
    """The rates of a device, None if nobody has measured it."""
    return next((rates for part, rates in RATES.items() if device_name and part in device_name), None)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What a model's cost depends on."""

    layer_weights: int
    """Parameters of all layers' products."""
    head_weights: int
    attention_width: int
    """Query heads × their width, summed over the layers."""
    kv_bytes: int
    """Of one token, over all layers."""
    itemsize: int

    @classmethod
    def of(cls, config: PreTrainedConfig, *, dtype: str) -> Dimensions | None:
        """From a configuration; None for a family whose layers are not counted here."""
        if config.model_type not in GATED_FAMILIES:
            return None
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = config.num_key_value_heads
        itemsize = 4 if dtype == "float32" else 2
        attention = hidden * width * (2 * heads + 2 * kv_heads)
        return cls(
            layer_weights=layers * (attention + 3 * hidden * config.intermediate_size),
            head_weights=hidden * config.vocab_size,
            attention_width=layers * heads * width,
            kv_bytes=2 * layers * kv_heads * width * itemsize,
            itemsize=itemsize,
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    rows: int
    """Tokens that go through the layers."""
    outputs: int
    """Rows that go through the head."""
    keys: float
    """Tokens whose K/V is read, each once."""
    pairs: float
    """Sum over the rows of the keys they see."""

    def seconds(self, dimensions: Dimensions, rates: Rates) -> float:
        """The least time for it."""
        d = dimensions
        moved = (d.layer_weights + d.head_weights) * d.itemsize / rates.bytes_per_second
        multiplied = 2 * (d.layer_weights * self.rows + d.head_weights * self.outputs) / rates.flops_per_second
        read = self.keys * d.kv_bytes / rates.bytes_per_second
        attended = 4 * d.attention_width * self.pairs / rates.flops_per_second
        return max(moved, multiplied) + max(read, attended)


def floor_of(case: Case, dimensions: Dimensions, rates: Rates | None) -> float | None:
    """The floor in the case's unit; None where the device's rates are not known."""
    if isinstance(case, Memory):
        return (case.prefix + case.branches * case.tokens) * dimensions.kv_bytes / 1e6
    if rates is None:
        return None
    return 1e3 * sum(one.seconds(dimensions, rates) for one in _passes(case))


def _passes(case: Case) -> Iterator[Pass]:
    if isinstance(case, Decode):
        yield _step(0, case.prompt + (case.short + case.long) / 2, case.batch)
    elif isinstance(case, Fanout):
        yield from _generation(case.prefix, case.branches, case.tokens)
    elif isinstance(case, FirstToken):
        yield _step(case.prefix, 1, case.children)
    elif isinstance(case, Score):
        rows = case.choices * (case.tokens - 1)
        yield Pass(rows, rows, case.prefix + rows, rows * (case.prefix + case.tokens / 2))
    elif isinstance(case, Thoughts):
        yield from _thoughts(case)
    elif isinstance(case, MonteCarlo):
        yield from _monte_carlo(case)


def _step(shared: float, own: float, branches: int) -> Pass:
    """One token of each branch, which shares a prefix with the others and has `own` tokens for itself."""
    return Pass(branches, branches, shared + branches * own, branches * (shared + own))


def _generation(shared: float, branches: int, tokens: int) -> Iterator[Pass]:
    """The tokens after the first, which a kept row gives."""
    for number in range(1, tokens):
        yield _step(shared, number, branches)


def _prefill(tokens: int) -> Pass:
    return Pass(tokens, 1, tokens, tokens * tokens / 2)


def _value(shared: float, own: float, branches: int) -> Pass:
    """One token after a cue on each branch; the branch's last token has not gone through yet."""
    rows = branches * (1 + len(CUE))
    return Pass(rows, branches, shared + branches * (own + len(CUE)), rows * (shared + own))


def _thoughts(case: Thoughts) -> Iterator[Pass]:
    """At every depth the front's own last thoughts, and at least one path to them."""
    yield _prefill(case.prompt)
    front = 1
    for depth in range(case.depth):
        branches = front * case.branch
        keys = case.prompt + (front + depth - 1) * case.tokens * (depth > 0)
        seen = case.prompt + depth * case.tokens
        for number in range(1, case.tokens):
            yield Pass(branches, branches, keys + branches * number, branches * (seen + number))
        value = _value(seen, case.tokens, branches)
        yield Pass(value.rows, value.outputs, keys + branches * (case.tokens + len(CUE)), value.pairs)
        front = min(case.keep, branches)


def _monte_carlo(case: MonteCarlo) -> Iterator[Pass]:
    yield _prefill(case.prompt)
    depths = case.depths()
    for pick in case.picks():
        path = case.prompt + depths[pick] * case.tokens
        yield from _generation(path, case.branch, case.tokens)
        yield _value(path, case.tokens, case.branch)
