"""Every back end against the definition of attention, on random trees, in a pool full of NaNs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.ordered import OrderedAttention
from dendrite.engine.attention.reference import ReferenceAttention
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec
from tests.engine.attention import conformance
from tests.engine.attention.conformance import Node

Backend = Callable[[KVPool, ModelSpec], AttentionBackend]

EXACT = 1e-5
ROUNDED = 0.06
"""bfloat16 keeps 8 bits: scores of up to 10 are off by up to 0.03, and weights by as much of values of up to 4."""

backends = pytest.mark.parametrize("backend", [ReferenceAttention, TreeAttention, OrderedAttention])

SHAPES: dict[str, Node] = {
    "star": conformance.star(12, 100, 9),
    "star of a long trunk": conformance.star(3, 2500, 40),
    "balanced": conformance.balanced(3, 3, 11),
    "chain": conformance.chain(60, 3),
    "chain of long nodes": conformance.chain(2, 300),
    "comb": conformance.comb(20, 5),
    "single tokens": conformance.balanced(4, 2, 1),
    "one key": Node(1, 1),
    "whole prompt": Node(300, 300),
    "chunk of a prompt": Node(300, 130),
    "chunk above leaves": Node(64, 40, [Node(5, 1), Node(90, 70), Node(3, 3)]),
    "short suffixes": Node(80, 0, [Node(4, 4), Node(1, 1), Node(6, 6)]),
    "leaves of many lengths": Node(10, 0, [Node(length, 1) for length in (1, 700, 3, 1, 40, 2)]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operators this small only wait for each other's threads, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@backends
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_scattered", [False, True])
def test_shapes(backend: Backend, name: str, is_scattered: bool) -> None:
    """Trees of every typical shape, in contiguous and in scattered blocks."""
    case = conformance.make_case(SHAPES[name], random.Random(name), is_scattered=is_scattered)
    conformance.assert_conforms(backend, case, EXACT)


@backends
@pytest.mark.parametrize("seed", range(20))
def test_random_trees(backend: Backend, seed: int) -> None:
    """Random trees with chunks and decoding rows side by side, random block sizes."""
    rng = random.Random(seed)
    case = conformance.make_case(
        conformance.drawn(rng), rng, block_size=rng.choice([1, 3, 8, 16]), is_scattered=rng.random() < 0.5
    )
    conformance.assert_conforms(backend, case, EXACT)


@backends
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (9, 3), (8, 2), (8, 1)])
def test_head_shapes(backend: Backend, head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Query heads per K/V head from 1 to 8, common and odd head widths."""
    tree = Node(90, 30, [conformance.star(4, 20, 6), Node(3, 1)])
    case = conformance.make_case(
        tree, random.Random(head_dim), head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    conformance.assert_conforms(backend, case, EXACT)


@backends
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16(backend: Backend, name: str) -> None:
    """Half precision stays within its rounding."""
    case = conformance.make_case(SHAPES[name], random.Random(name), dtype="bfloat16", block_size=16, head_dim=64)
    conformance.assert_conforms(backend, case, ROUNDED)


@backends
def test_segments_in_any_order(backend: Backend) -> None:
    """The order of a plan's segments means nothing."""
    rng = random.Random(3)
    case = conformance.make_case(conformance.drawn(rng, depth=3), rng)
    shuffled = list(case.plan.segments)
    rng.shuffle(shuffled)
    case.plan = type(case.plan)(case.plan.num_rows, tuple(shuffled))
    conformance.assert_conforms(backend, case, EXACT)


@backends
def test_plans_replace_each_other(backend: Backend) -> None:
    """A back end that has run one plan runs the next as if it were the first."""
    case = conformance.make_case(conformance.balanced(2, 3, 9), random.Random(5))
    made = backend(case.pool, case.spec)
    made.prepare(case.plan)
    made.run(0, case.query, 1.0)
    spans = tuple((slot, slot + 1) for slot in case.row_slots[4])
    one = replace(case, plan=Plan(1, (Segment(spans, len(spans), 0, 1),)), query=case.query[4:5])
    one.row_slots = [case.row_slots[4]]
    conformance.assert_conforms(lambda _pool, _spec: made, one, EXACT)
