"""Trees for the attention benchmark: every leaf decodes one row over the keys on its path; and chunks of prompts.

Inner nodes lie in adjacent blocks, as a prefix does that was computed at once; leaves have theirs in turn, as branches
do that grow side by side.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dendrite.engine.batch import Plan, Segment

BLOCK_SIZE = 16


@dataclass
class Node:
    """Keys below a parent."""

    num_keys: int
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tree:
    """A planned tree."""

    name: str
    plan: Plan
    num_blocks: int
    """How many blocks of `BLOCK_SIZE` slots it takes, without the trash block."""

    @property
    def num_keys(self) -> int:
        """Keys in the tree, each once."""
        return sum(segment.num_keys for segment in self.plan.segments)

    @property
    def num_pairs(self) -> int:
        """Sum over the rows of the keys that they read."""
        whole = sum(segment.num_keys * (segment.row_end - segment.row_start) for segment in self.plan.segments)
        hidden = sum(segment.causal_rows * (segment.causal_rows - 1) // 2 for segment in self.plan.segments)
        return whole - hidden

    @property
    def is_prompt(self) -> bool:
        """Whether rows attend to each other."""
        return any(segment.causal_rows for segment in self.plan.segments)

    def row_blocks(self, row: int) -> list[int]:
        """The blocks of a row's path, all of them full: what a kernel is given that knows no trees."""
        return [
            block
            for segment in self.plan.segments
            if segment.row_start <= row < segment.row_end
            for first, last in segment.spans
            for block in range(first // BLOCK_SIZE, last // BLOCK_SIZE)
        ]


def trees(prefixes: Sequence[int], branches: Sequence[int], leaf: int) -> Iterator[Tree]:
    """Stars of all sizes, then deep, ragged and unbalanced trees of about the largest star's size.

    Args:
        prefixes: keys that a star's branches share.
        branches: how many.
        leaf: keys of their own that a star's branches have; lengths are rounded up to whole blocks.
    """
    for prefix, num_branches in itertools.product(prefixes, branches):
        yield planned(f"star: {num_branches} × {leaf} over {prefix:,}", star(prefix, [leaf] * num_branches))
    prefix, width = max(prefixes), max(2, max(branches) // 2)
    rng = random.Random(0)
    yield planned(f"chain: {width} levels of {prefix // width:,}", chain(prefix // width, width, leaf))
    yield planned(f"comb: {width} levels of {prefix // width:,}", comb(prefix // width, width, leaf))
    yield planned(f"balanced: 4 levels, {prefix // 8:,} each", balanced(prefix // 8, 4, leaf))
    ragged = [rng.randint(1, 4 * leaf) for _ in range(width)]
    yield planned(f"ragged: {width} of 1 to {4 * leaf} over {prefix:,}", star(prefix, ragged))
    long = [max(leaf, prefix // 4), *[leaf] * (width - 1)]
    yield planned(f"unbalanced: one of {long[0]:,} beside {width - 1} × {leaf}", star(prefix, long))


def prompts(chunk: int, keys_before: Sequence[int]) -> Iterator[Tree]:
    """A prompt's chunk of so many rows behind each of these numbers of keys; both are rounded up to whole blocks."""
    num_rows = -(-chunk // BLOCK_SIZE) * BLOCK_SIZE
    for before in keys_before:
        first, last = BLOCK_SIZE, BLOCK_SIZE * (1 + -(-before // BLOCK_SIZE))
        shared = (Segment(((first, last),), last - first, 0, num_rows),) if before else ()
        own = Segment(((last, last + num_rows),), num_rows, 0, num_rows, num_rows)
        plan = Plan(num_rows, (*shared, own))
        yield Tree(f"prompt: {num_rows:,} rows after {before:,} keys", plan, (last + num_rows) // BLOCK_SIZE - 1)


def star(prefix: int, leaves: Sequence[int]) -> Node:
    """Leaves of these lengths below one prefix."""
    return Node(prefix, [Node(leaf) for leaf in leaves])


def chain(num_keys: int, depth: int, leaf: int) -> Node:
    """One path of `depth` nodes that ends in two leaves."""
    node = star(num_keys, [leaf, leaf])
    for _ in range(depth - 1):
        node = Node(num_keys, [node])
    return node


def comb(num_keys: int, depth: int, leaf: int) -> Node:
    """A path of `depth` nodes with a leaf at each."""
    node = Node(num_keys, [Node(leaf)])
    for _ in range(depth - 1):
        node = Node(num_keys, [Node(leaf), node])
    return node


def balanced(num_keys: int, depth: int, leaf: int) -> Node:
    """Every node has three children, below the last level leaves."""
    if depth == 0:
        return Node(leaf)
    return Node(num_keys, [balanced(num_keys, depth - 1, leaf) for _ in range(3)])


def planned(name: str, root: Node) -> Tree:
    """Give nodes blocks, rows and segments."""
    nodes: list[tuple[Node, int, int]] = []
    num_rows = _number(root, 0, nodes)
    blocks: dict[int, list[int]] = {id(node): [] for node, _, _ in nodes}
    free = itertools.count(1)
    leaves = [node for node, _, _ in nodes if not node.children]
    for node, _, _ in nodes:
        if node.children:
            blocks[id(node)] = list(itertools.islice(free, _num_blocks(node)))
    for turn in range(max(map(_num_blocks, leaves))):
        for leaf in leaves:
            if turn < _num_blocks(leaf):
                blocks[id(leaf)].append(next(free))
    segments = tuple(
        Segment(_spans(blocks[id(node)]), _num_blocks(node) * BLOCK_SIZE, first, last) for node, first, last in nodes
    )
    return Tree(name, Plan(num_rows, segments), next(free) - 1)


def _number(node: Node, row: int, nodes: list[tuple[Node, int, int]]) -> int:
    """Lists a subtree's nodes with the rows below them, from `row` on; the row after them."""
    index, first = len(nodes), row
    for child in node.children:
        row = _number(child, row, nodes)
    row = max(row, first + 1)
    nodes.insert(index, (node, first, row))
    return row


def _num_blocks(node: Node) -> int:
    return -(-max(node.num_keys, 1) // BLOCK_SIZE)


def _spans(blocks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for block in blocks:
        first, last = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        if spans and spans[-1][1] == first:
            first = spans.pop()[0]
        spans.append((first, last))
    return tuple(spans)
