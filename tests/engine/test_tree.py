"""The KV tree: what forks, writes, roll-backs and prunes do to nodes and blocks."""

from __future__ import annotations

import pytest

from dendrite.engine.blocks import BlockPool
from dendrite.engine.demand import demand
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.nodes import Tip
from dendrite.engine.tree import KVTree


def make_tree(num_blocks: int = 64, block_size: int = 4) -> KVTree:
    """A tree over a fresh pool of so many usable blocks."""
    return KVTree(BlockPool(num_blocks + 1, block_size))


def compute(tree: KVTree, tip: Tip) -> list[tuple[int, int]]:
    """Places and "computes" everything the tip's path lacks; returns the copies it took."""
    copies: list[tuple[int, int]] = []
    for node, upto in tree.pending(tip):
        copies += tree.place(node, upto)
        node.num_computed = upto
    return copies


def assert_all_free(tree: KVTree) -> None:
    """Every block is available, and free once the cache is cleared."""
    tree.check_integrity()
    assert tree.pool.num_used == 0
    assert tree.pool.num_available == tree.pool.num_total
    tree.clear_cache()
    tree.check_integrity()
    assert tree.pool.num_free == tree.pool.num_total
    assert not tree.nodes


def test_a_fork_takes_no_block_and_no_node() -> None:
    """64 forks of a computed parent leave pool and nodes as they were."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(30)))
    compute(tree, root)
    used, nodes = tree.pool.num_used, len(tree.nodes)
    forks = [tree.fork(root) for _ in range(64)]
    assert (tree.pool.num_used, len(tree.nodes)) == (used, nodes)
    assert all(tree.token_ids(fork) == list(range(30)) for fork in forks)
    tree.check_integrity()


def test_the_first_writer_goes_on_in_place_and_the_second_copies_one_block() -> None:
    """root: 6 tokens in blocks [1 2]; a writes slot 2 of block 2, b copies block 2, both then have one more each."""
    tree = make_tree()
    root, _ = tree.new_root([0, 1, 2, 3, 4, 5])
    compute(tree, root)
    a, b = tree.fork(root), tree.fork(root)
    tail = root.node.blocks[-1]
    tree.extend(a, [10])
    assert compute(tree, a) == []
    assert a.node.blocks == [tail]
    assert tree.pool.ref_count(tail) == 2
    tree.extend(b, [20])
    ((source, copy),) = compute(tree, b)
    assert source == tail
    assert b.node.blocks == [copy]
    assert tree.num_copies == 1
    tree.check_integrity()


def test_a_parent_that_goes_on_after_its_child_copies_its_own_tail() -> None:
    """The child wrote first, so the parent's next token needs a block of its own; the child's stays."""
    tree = make_tree()
    root, _ = tree.new_root([0, 1, 2, 3, 4, 5])
    compute(tree, root)
    child = tree.fork(root)
    tree.extend(child, [10])
    compute(tree, child)
    shared = child.node.blocks[0]
    tree.extend(root, [6])
    ((source, copy),) = compute(tree, root)
    assert source == shared
    assert root.node.blocks[-1] == copy
    assert tree.pool.ref_count(shared) == 1
    assert tree.token_ids(root) == [0, 1, 2, 3, 4, 5, 6]
    assert tree.token_ids(child) == [0, 1, 2, 3, 4, 5, 10]
    tree.check_integrity()


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_pruning_everything_frees_everything(block_size: int) -> None:
    """Whatever the order, free = total at the end."""
    tree = make_tree(block_size=block_size)
    root, _ = tree.new_root(list(range(11)))
    compute(tree, root)
    forks = [tree.fork(root, at=at) for at in (3, 4, 5, 11, 11)]
    for index, fork in enumerate(forks):
        tree.extend(fork, [100 + index] * 5)
        compute(tree, fork)
    for tip in (forks[0], root, *forks[1:]):
        tree.prune(tip)
        tree.check_integrity()
    assert_all_free(tree)


def test_pruning_a_parent_keeps_what_its_children_read() -> None:
    """Beyond the largest live offset the parent's blocks are released at once."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(20)))
    compute(tree, root)
    child = tree.fork(root, at=6)
    tree.prune(root)
    assert tree.pool.num_used == 2
    assert tree.token_ids(child) == list(range(6))
    tree.check_integrity()


def test_the_last_fork_of_a_pruned_parent_writes_into_its_node() -> None:
    """A chain of forks whose parents are pruned stays one node, so deep searches read one segment."""
    tree = make_tree()
    tip, _ = tree.new_root([0, 1, 2])
    for token in range(10):
        compute(tree, tip)
        child = tree.fork(tip)
        tree.prune(tip)
        tree.extend(child, [token])
        tip = child
    assert len(tree.nodes) == 1
    assert tree.token_ids(tip) == [0, 1, 2, *range(10)]
    tree.check_integrity()


def test_equal_prefixes_are_shared_from_a_block_on() -> None:
    """Two prompts with 6 tokens in common: one node for those, whether computed yet or not; 3 are too few."""
    tree = make_tree()
    a, shared_a = tree.new_root([1, 2, 3, 4, 5, 6, 7])
    b, shared_b = tree.new_root([1, 2, 3, 4, 5, 6, 8, 9])
    c, shared_c = tree.new_root([1, 2, 3, 9])
    d, shared_d = tree.new_root([1, 2, 3, 4, 5, 6, 8, 9, 10])
    assert (shared_a, shared_b, shared_c, shared_d) == (0, 6, 0, 8)
    assert b.node.parent is a.node
    assert d.node.parent is b.node
    assert c.node.parent is None
    for tip, tokens in ((a, [1, 2, 3, 4, 5, 6, 7]), (b, [1, 2, 3, 4, 5, 6, 8, 9]), (c, [1, 2, 3, 9])):
        assert tree.token_ids(tip) == tokens
    tree.check_integrity()


def test_a_whole_short_prompt_is_shared_too() -> None:
    """A prompt below one block is shared when it is all there."""
    tree = make_tree()
    tree.new_root([1, 2])
    again, shared = tree.new_root([1, 2])
    assert shared == 2
    assert again.node.token_ids == [1, 2]


def test_rolling_back_below_a_fork_keeps_the_forks_tokens() -> None:
    """The branch goes on from offset 4 in a node of its own; the fork at 8 still reads the old tokens."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(8)))
    compute(tree, root)
    fork = tree.fork(root)
    tree.truncate(root, 4)
    tree.extend(root, [40])
    compute(tree, root)
    assert tree.token_ids(root) == [0, 1, 2, 3, 40]
    assert tree.token_ids(fork) == list(range(8))
    tree.check_integrity()


def test_rolling_back_gives_blocks_back() -> None:
    """Nobody else reads the tail: its blocks are free, and the node can be written again."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(16)))
    compute(tree, root)
    tree.truncate(root, 5)
    assert tree.pool.num_used == 2
    tree.extend(root, [50, 51])
    assert compute(tree, root) == []
    assert tree.token_ids(root) == [0, 1, 2, 3, 4, 50, 51]
    tree.check_integrity()


def test_a_refused_placement_changes_nothing() -> None:
    """A pool too small names what is needed and free; counts and blocks stay."""
    tree = make_tree(num_blocks=2)
    root, _ = tree.new_root(list(range(12)))
    with pytest.raises(OutOfBlocks) as caught:
        tree.place(root.node, 12)
    assert (caught.value.needed, caught.value.free) == (3, 2)
    assert (root.node.num_placed, root.node.blocks, tree.pool.num_free) == (0, [], 2)
    tree.check_integrity()


def test_demand_counts_shared_pending_tokens_once() -> None:
    """A hundred forks of an uncomputed prompt of 5 blocks need 5 blocks, and one or two each for their own tokens."""
    tree = make_tree(num_blocks=400)
    root, _ = tree.new_root(list(range(20)))
    forks = [tree.fork(root) for _ in range(100)]
    assert demand(tree.pool, [(fork, 0, False) for fork in forks]) == 5
    assert demand(tree.pool, [(fork, 4, False) for fork in forks]) == 105
    assert demand(tree.pool, [(root, 4, False)]) == 6


def test_walks_are_iterative() -> None:
    """Depth 10,000: reading, checking, forking at the root and pruning from the bottom."""
    tree = make_tree(num_blocks=10_100, block_size=1)
    root, _ = tree.new_root([0])
    tips = [root]
    for token in range(1, 10_001):
        tip = tree.fork(tips[-1])
        tree.extend(tip, [token])
        tips.append(tip)
    compute(tree, tips[-1])
    assert tree.token_ids(tips[-1]) == list(range(10_001))
    early = tree.fork(tips[-1], at=1)
    tree.check_integrity()
    for tip in tips[:-1]:
        tree.prune(tip)
    tree.check_integrity()
    tree.prune(early)
    tree.prune(tips[-1])
    assert_all_free(tree)


def test_spans_join_blocks_that_lie_side_by_side() -> None:
    """A contiguous node is one span, clipped to the tokens asked for."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(10)))
    compute(tree, root)
    assert tree.spans(root.node, 0, 10) == [(4, 14)]
    assert tree.spans(root.node, 3, 5) == [(7, 9)]
    assert tree.slots(root.node, 3, 5) == [7, 8]


def test_a_node_in_pieces_has_a_span_each() -> None:
    """Blocks taken far apart stay apart."""
    tree = make_tree()
    root, _ = tree.new_root(list(range(4)))
    compute(tree, root)
    blocker = tree.pool.allocate(1, after=root.node.blocks[-1])
    tree.extend(root, [4, 5])
    compute(tree, root)
    spans = tree.spans(root.node, 0, 6)
    assert len(spans) == 2
    assert sum(end - begin for begin, end in spans) == 6
    tree.pool.release(blocker)


def test_a_running_writer_keeps_its_tail_block() -> None:
    """A child of a branch that is generating copies, although it comes first: the writer's blocks were counted."""
    tree = make_tree()
    root, _ = tree.new_root([0, 1, 2, 3, 4, 5])
    compute(tree, root)
    child = tree.fork(root)
    tree.extend(child, [10])
    root.status = "running"
    assert tree.copy_source(child.node) is not None
    root.status = "idle"
    assert tree.copy_source(child.node) is None
