"""The block pool: counting, side-by-side runs, integrity."""

from __future__ import annotations

import random

import pytest

from dendrite.engine.blocks import BlockPool
from dendrite.engine.ids import BlockId


def test_a_new_run_is_contiguous_and_skips_the_trash_block() -> None:
    """The first blocks handed out are 1, 2 and 3."""
    pool = BlockPool(9, 16)
    assert pool.num_total == 8
    assert pool.allocate(3) == [1, 2, 3]
    assert (pool.num_free, pool.num_used) == (5, 3)


def test_a_run_grows_in_place_while_its_neighbour_starts_behind_a_gap() -> None:
    """Two growing runs stay contiguous each, because the second started past a gap."""
    pool = BlockPool(201, 16)
    a, b = pool.allocate(1), pool.allocate(1)
    for _ in range(4):
        a += pool.allocate(1, after=a[-1])
        b += pool.allocate(1, after=b[-1])
    assert a == list(range(a[0], a[0] + 5))
    assert b == list(range(b[0], b[0] + 5))


def test_every_block_can_be_taken_and_given_back() -> None:
    """Gaps are no loss: a full pool hands out each block once, and is whole again afterwards."""
    pool = BlockPool(65, 4)
    taken = [pool.allocate(1)[0] for _ in range(64)]
    assert sorted(taken) == list(range(1, 65))
    pool.release(taken)
    pool.check_integrity({}, {})
    assert pool.allocate(64) == list(range(1, 65))


def test_a_shared_block_is_free_after_its_last_release() -> None:
    """Two references, two releases."""
    pool = BlockPool(3, 4)
    (block,) = pool.allocate(1)
    pool.share(block)
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_a_kept_block_is_cached_until_it_is_dropped() -> None:
    """used, used and kept, cached, used again, cached, free; a cached block is available all the time."""
    pool = BlockPool(3, 4)
    (block,) = pool.allocate(1)
    seen = [(pool.num_used, pool.num_cached, pool.num_free)]
    for change in (pool.keep, pool.release):
        change([block])
        seen.append((pool.num_used, pool.num_cached, pool.num_free))
    pool.share(block)
    seen.append((pool.num_used, pool.num_cached, pool.num_free))
    pool.release([block])
    pool.check_integrity({}, {block: 1})
    assert pool.num_available == 2
    pool.drop([block])
    assert seen == [(1, 0, 1), (1, 0, 1), (0, 1, 1), (1, 0, 1)]
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 0, 2)


@pytest.mark.parametrize("block", [BlockId(0), BlockId(2)])
def test_a_free_or_trash_block_cannot_be_released(block: BlockId) -> None:
    """A double free is our own bug: an assertion names the block."""
    pool = BlockPool(3, 4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match=f"block {block}"):
        pool.release([block])


def test_random_traffic_keeps_the_free_runs_whole() -> None:
    """A thousand random takes and returns, invariants after each."""
    rng = random.Random(7)
    pool = BlockPool(97, 4)
    held: list[list[BlockId]] = []
    for _ in range(1000):
        if held and (rng.random() < 0.5 or not pool.num_free):
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            after = held[-1][-1] if held and rng.random() < 0.5 else None
            held.append(pool.allocate(rng.randint(1, min(7, pool.num_free)), after=after))
        pool.check_integrity({block: 1 for blocks in held for block in blocks}, {})
