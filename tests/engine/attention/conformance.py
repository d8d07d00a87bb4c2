"""What every attention back end must do: a random tree in a pool, and the definition of attention to compare with.

Trees are drawn in tokens. Some of their tokens are in the pool already, others are rows of the step. The pool is full
of NaNs wherever no token of the tree lies, so that a back end that reads beyond its keys shows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.kv_pool import KVPool
from dendrite.engine.spec import ModelSpec


@dataclass
class Node:
    """Tokens below a parent: `num_keys` in all, the last `num_rows` of them queries of this step."""

    num_keys: int
    num_rows: int = 0
    children: list[Node] = field(default_factory=list)


@dataclass
class Case:
    """A planned tree with its queries, and where each row's keys lie."""

    pool: KVPool
    spec: ModelSpec
    plan: Plan
    row_slots: list[list[int]]
    query: Tensor  # [num_rows, num_heads, head_dim]


def star(num_leaves: int, trunk: int, leaf: int) -> Node:
    """One trunk, decoding leaves: the shape of sampling n answers."""
    return Node(trunk, children=[Node(leaf, 1) for _ in range(num_leaves)])


def balanced(depth: int, width: int, num_keys: int) -> Node:
    """Every node branches alike; only leaves decode."""
    if depth == 0:
        return Node(num_keys, 1)
    return Node(num_keys, children=[balanced(depth - 1, width, num_keys) for _ in range(width)])


def chain(depth: int, num_keys: int) -> Node:
    """One deep path."""
    node = Node(num_keys, 1)
    for _ in range(depth):
        node = Node(num_keys, children=[node])
    return node


def comb(depth: int, num_keys: int) -> Node:
    """A deep path with a decoding leaf at every node."""
    node = Node(num_keys, 1)
    for _ in range(depth):
        node = Node(num_keys, children=[Node(num_keys, 1), node])
    return node


def drawn(rng: random.Random, depth: int = 4) -> Node:
    """Any tree: mixed lengths, chunks above and beside decoding leaves."""
    num_keys = rng.choice([1, 1, 2, 7, 16, 33, 150])
    num_rows = rng.choice([0, 1, num_keys, rng.randint(1, num_keys)])
    num_children = rng.randint(0, 3) if depth else 0
    if not num_children:
        num_rows = max(num_rows, 1)
    return Node(num_keys, num_rows, [drawn(rng, depth - 1) for _ in range(num_children)])


def make_case(
    tree: Node,
    rng: random.Random,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
    dtype: str = "float32",
    is_scattered: bool = False,
    is_aligned: bool = False,
    device: str = "cpu",
) -> Case:
    """Place a tree into a pool, contiguous or scattered block by block, and plan it.

    An aligned tree lies in its blocks as the engine's does: a key at its position's offset, behind a copy of what comes
    before it in the block, or in the block that its parent ended in. Otherwise nodes begin anywhere in a block.
    """
    layout = _Layout(rng, block_size, is_scattered=is_scattered, is_aligned=is_aligned)
    layout.place(tree, [])
    spec = ModelSpec("case", 2, num_heads, num_kv_heads, head_dim, num_heads * head_dim, 8, 1 << 20, dtype)
    num_blocks = max(layout.last_block, 1)
    pool = KVPool(spec, num_blocks=num_blocks, block_size=block_size, device=torch.device(device))
    pool.data.fill_(torch.nan)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    used = torch.tensor(sorted({slot for slots in layout.row_slots for slot in slots}))
    shape = (*pool.data.shape[:3], len(used), head_dim)
    pool.data[:, :, :, used] = torch.randn(shape, generator=generator).to(pool.data)
    for source, target in layout.copies:
        pool.data[:, :, :, target] = pool.data[:, :, :, source]
    query = torch.randn((len(layout.row_slots), num_heads, head_dim), generator=generator).to(pool.data)
    return Case(pool, spec, Plan(len(layout.row_slots), tuple(layout.segments)), layout.row_slots, query)


class _Layout:
    """Gives every node blocks of its own and cuts it into segments."""

    def __init__(self, rng: random.Random, block_size: int, *, is_scattered: bool, is_aligned: bool) -> None:
        self._rng = rng
        self._block_size = block_size
        self._gap = 2 if is_scattered else 0
        self._is_aligned = is_aligned
        self._written: dict[int, int] = {}  # block -> slots of it that have a writer
        self.last_block = 0
        self.segments: list[Segment] = []
        self.row_slots: list[list[int]] = []
        self.copies: list[tuple[int, int]] = []
        """Slots to copy, in this order: (source, target)."""

    def place(self, node: Node, path: list[int]) -> None:
        slots = self._aligned_slots(node.num_keys, path) if self._is_aligned else self._slots(node.num_keys)
        row_start, index = len(self.row_slots), len(self.segments)
        for key in range(node.num_keys - node.num_rows, node.num_keys):
            self.row_slots.append([*path, *slots[: key + 1]])
        for child in node.children:
            self.place(child, path + slots)
        if len(self.row_slots) > row_start:
            segment = Segment(_spans(slots), node.num_keys, row_start, len(self.row_slots), node.num_rows)
            self.segments.insert(index, segment)

    def _slots(self, num_keys: int) -> list[int]:
        """Slots that start anywhere in a block, as a node's do after a copy-on-write."""
        first = self._rng.randrange(self._block_size)
        slots = []
        for key in range(first, first + num_keys):
            if key == first or key % self._block_size == 0:
                self.last_block += 1 + self._rng.randint(0, self._gap)
            slots.append(self.last_block * self._block_size + key % self._block_size)
        return slots

    def _aligned_slots(self, num_keys: int, path: list[int]) -> list[int]:
        """Slots as `KVTree.place` gives them: the first child goes on in its parent's block, others copy it."""
        size, slots = self._block_size, []
        block = path[-1] // size if path else 0
        if len(path) % size and self._written[block] != len(path) % size:
            block = self._new_block()
            lead = self._whole_tail(path)
            self.copies += zip(lead, range(block * size, block * size + len(lead)), strict=True)
        for position in range(len(path), len(path) + num_keys):
            block = block if position % size else self._new_block()
            self._written[block] = position % size + 1
            slots.append(block * size + position % size)
        return slots

    def _whole_tail(self, path: list[int]) -> list[int]:
        """The slots from the beginning of the path's last block to its last key: it is whole, whoever wrote it."""
        return list(range(path[-1] // self._block_size * self._block_size, path[-1] + 1))

    def _new_block(self) -> int:
        self.last_block += 1 + self._rng.randint(0, self._gap)
        return self.last_block


def _spans(slots: list[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for slot in slots:
        if spans and spans[-1][1] == slot:
            spans[-1] = (spans[-1][0], slot + 1)
        else:
            spans.append((slot, slot + 1))
    return tuple(spans)


def expected(case: Case, layer: int, scale: float) -> Tensor:
    """Attention by its definition, float64, wherever the pool is: [num_rows, num_heads, head_dim], on the CPU."""
    group = case.spec.num_heads // case.spec.num_kv_heads
    rows = []
    pool = case.pool.data[layer].double()
    for query, slots in zip(case.query.double(), case.row_slots, strict=True):
        keys, values = pool[:, :, slots].repeat_interleave(group, dim=1)
        weights = torch.softmax(torch.einsum("hd,hkd->hk", query, keys) * scale, dim=-1)
        rows.append(torch.einsum("hk,hkd->hd", weights, values))
    return torch.stack(rows).cpu()


def assert_conforms(backend: Callable[[KVPool, ModelSpec], AttentionBackend], case: Case, tolerance: float) -> None:
    """Prepare once, run every layer, compare each with the definition."""
    made = backend(case.pool, case.spec)
    made.prepare(case.plan)
    for layer in range(case.spec.num_layers):
        output = made.run(layer, case.query, 0.3)
        assert output.shape == case.query.shape
        assert output.dtype == case.query.dtype
        torch.testing.assert_close(output.cpu().double(), expected(case, layer, 0.3), rtol=0, atol=tolerance)
