"""Every kind of corruption, injected: noticed, named, and nothing wrong comes out of the engine afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import EngineDead, IntegrityError
from dendrite.engine.guarded_pool import GuardedPool, TaggedBlock
from dendrite.engine.ids import BlockId
from dendrite.engine.kv_mover import PoolMover
from dendrite.engine.pressure import Pressure
from dendrite.testing import scripted_engine
from tests.engine.test_pressure import reply, search

MODES = ("canary", "checksum")


def grown(mode: str) -> tuple[Engine, Branch, Branch]:
    """An engine, and two branches below a common start, both with K/V of their own."""
    engine = scripted_engine(reply, integrity=mode)
    a, b = engine.root("everything hangs on this plan:", seed=1).fork(2)
    for branch, text in ((a, " first of all"), (b, " and then")):
        branch.append(text)
        branch.generate(max_tokens=5, temperature=1.0)
    return engine, a, b


def pool_of(engine: Engine) -> GuardedPool:
    pool = engine.core._tree.pool
    assert isinstance(pool, GuardedPool)
    return pool


def free_while_held(engine: Engine, a: Branch, b: Branch) -> None:
    pool_of(engine).release([a.record.tip.node.blocks[1]])


def free_and_hand_out_again(engine: Engine, a: Branch, b: Branch) -> None:
    blocks = a.record.tip.node.blocks
    pool = pool_of(engine)
    pool.release([blocks[1]])
    while pool.tag(blocks[1]) == 0:
        pool.allocate(1)


def a_number_out_of_nowhere(engine: Engine, a: Branch, b: Branch) -> None:
    blocks = a.record.tip.node.blocks
    blocks[1] = BlockId(int(blocks[1]))


def a_siblings_block(engine: Engine, a: Branch, b: Branch) -> None:
    a.record.tip.node.blocks[1] = b.record.tip.node.blocks[1]


def an_own_block_twice(engine: Engine, a: Branch, b: Branch) -> None:
    blocks = a.record.tip.node.blocks
    blocks[1] = blocks[2]


def a_stale_plan(engine: Engine, a: Branch, b: Branch) -> None:
    node = a.record.tip.node.parent
    assert node is not None
    assert node.spans is not None
    node.spans = [(first, last, slot + 4) for first, last, slot in node.spans]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "corrupt",
    [
        free_while_held,
        free_and_hand_out_again,
        a_number_out_of_nowhere,
        a_siblings_block,
        an_own_block_twice,
        a_stale_plan,
    ],
)
def test_wrong_bookkeeping_ends_the_engine_before_anything_is_read(
    mode: str, corrupt: Callable[[Engine, Branch, Branch], None]
) -> None:
    """The call gets the error, with branch, node and block; later ones hear that the engine is dead, and why."""
    engine, a, b = grown(mode)
    with engine:
        engine.check_integrity()
        corrupt(engine, a, b)
        node = a.record.tip.node.parent if corrupt is a_stale_plan else a.record.tip.node
        assert node is not None
        a.append(" x")
        with pytest.raises(IntegrityError, match=f"node {node.node_id}, which the branch of") as caught:
            a.generate(max_tokens=5)
        assert caught.value.is_fatal
        assert caught.value.node == node.node_id
        assert caught.value.branch.startswith("the branch of ")
        assert caught.value.block > 0
        with pytest.raises(EngineDead) as dead:
            b.generate(max_tokens=5)
        assert dead.value.__cause__ is caught.value
        a.prune()  # nothing is given back twice any more
        b.prune()


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_is_freed_twice_is_noticed_when_that_happens(mode: str) -> None:
    """In the thread that prunes; a call that runs meanwhile is woken."""
    engine, a, b = grown(mode)
    with engine:
        block = a.record.tip.node.blocks[1]
        free_while_held(engine, a, b)
        running = engine.submit([b], max_tokens=2000, ignore_eos=True)
        with pytest.raises(IntegrityError, match="was freed while it was held") as caught:
            a.prune()
        assert caught.value.block == block
        assert caught.value.node is not None
        with pytest.raises(IntegrityError):
            running.wait()
        with pytest.raises(EngineDead):
            engine.root("more")


@pytest.mark.parametrize("mode", MODES)
def test_check_integrity_finds_what_no_step_reads(mode: str) -> None:
    """A block of an idle branch."""
    engine, a, b = grown(mode)
    with engine:
        a_siblings_block(engine, a, b)
        with pytest.raises(IntegrityError, match="belongs to node"):
            engine.check_integrity()
        with pytest.raises(EngineDead):
            b.generate(max_tokens=1)


def loaded(folder: Path, mode: str) -> Engine:
    return Engine.load(str(folder), dtype="float32", block_size=4, kv_memory="1MiB", integrity=mode)


def flip(engine: Engine, block: BlockId) -> None:
    """One bit of one value of one layer."""
    mover = engine.core.swap.mover
    assert isinstance(mover, PoolMover)
    words = mover._pool.data.view(torch.int32)
    slot = int(block) * 4 + 2
    words[1, 1, 0, slot, 3] ^= 1 << 20


def test_a_flipped_bit_fails_the_call_that_reads_it_and_is_computed_again(tiny_folder: Callable[[str], Path]) -> None:
    """Named with branch, node and block; the others in the step go on, and the next try says what it should."""
    with loaded(tiny_folder("llama"), "checksum") as engine:
        root = engine.root(token_ids=[5, 6, 7, 8] * 4)
        a, b = (root.fork().append([20 + index] * 9) for index in range(2))
        other = engine.root(token_ids=[30, 31, 32] * 5)
        wanted = [branch.fork().generate(max_tokens=12, ignore_eos=True).token_ids for branch in (a, b, other)]
        before = a.token_ids
        node = a.record.tip.node
        flip(engine, node.blocks[1])
        running = engine.submit([b.fork(), other.fork()], max_tokens=12, ignore_eos=True)
        with pytest.raises(IntegrityError, match="holds other K/V than was computed") as caught:
            a.fork().generate(max_tokens=40, ignore_eos=True)  # a sample of the blocks is looked at in each step
        error = caught.value
        assert (error.is_fatal, error.node, error.block) == (False, node.node_id, node_block(error))
        assert error.branch.startswith("the branch of ")
        assert [out.token_ids for out in running.wait()] == wanted[1:]
        assert a.token_ids == before
        assert a.fork().generate(max_tokens=12, ignore_eos=True).token_ids == wanted[0]
        engine.check_integrity()


def node_block(error: IntegrityError) -> int:
    return int(str(error).split()[1])


def test_a_flipped_bit_in_a_shared_prefix_is_found_by_check_integrity(tiny_folder: Callable[[str], Path]) -> None:
    """What was computed on it goes as well, and comes back right."""
    with loaded(tiny_folder("llama"), "checksum") as engine:
        root = engine.root(token_ids=[5, 6, 7, 8] * 4)
        kids = [root.fork().append([20 + index] * 9) for index in range(3)]
        wanted = engine.score_tokens(kids[1], [[40, 41, 42]])
        flip(engine, root.record.tip.node.blocks[2])
        with pytest.raises(IntegrityError, match="holds other K/V"):
            engine.check_integrity()
        assert engine.stats().physical_tokens == 0
        assert engine.score_tokens(kids[1], [[40, 41, 42]]) == wanted
        engine.check_integrity()


def test_a_copy_outside_the_pool_that_has_changed_is_computed_again(tiny_folder: Callable[[str], Path]) -> None:
    """A bit of a branch that was moved to host memory: what it goes on with is what it would have been."""
    with loaded(tiny_folder("llama"), "checksum") as engine:
        root = engine.root(token_ids=[5, 6, 7, 8] * 4)
        wanted = root.fork().generate(max_tokens=12, ignore_eos=True).token_ids
        num, core = engine.stats().blocks_total, engine.core
        with core.loop.lock:
            assert Pressure(core.loop.tree, core.swap).make_room(num, [])
        stored = root.record.tip.node.stored
        assert stored is not None
        assert isinstance(stored.saved, torch.Tensor)
        stored.saved.view(torch.int32)[1, 1, 0, 2, 3] ^= 1 << 20
        assert root.fork().generate(max_tokens=12, ignore_eos=True).token_ids == wanted
        assert engine.stats().tokens_swap_lost == 16
        assert engine.stats().tokens_swapped_in == 0
        engine.check_integrity()


def test_a_write_behind_the_pool_is_noticed(tiny_folder: Callable[[str], Path]) -> None:
    """By the guard block, in the next step."""
    with loaded(tiny_folder("llama"), "canary") as engine:
        root = engine.root(token_ids=[5, 6, 7, 8] * 4)
        root.generate(max_tokens=2)
        flip(engine, pool_of(engine).guard)
        with pytest.raises(IntegrityError, match="is a guard, and was written to"):
            root.generate(max_tokens=2)


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_search_under_pressure_raises_nothing(mode: str) -> None:
    """Forks, copies, moves out and in, cached prefixes: no false alarm, and the same tokens."""
    with scripted_engine(reply) as engine:
        wanted, peak = search(engine), engine.stats().blocks_peak
    with scripted_engine(reply, num_blocks=peak // 4 + 1, swap_memory=500, swap_disk=800, integrity=mode) as engine:
        for _ in range(3):
            assert search(engine) == wanted
            engine.check_integrity()
        assert engine.stats().tokens_swapped_in > 0


def test_without_the_option_nothing_is_tagged() -> None:
    """The pool is the plain one, and so are its ids."""
    with scripted_engine(reply) as engine:
        root = engine.root("some text that is long enough")
        root.generate(max_tokens=3)
        assert not isinstance(engine.core._tree.pool, GuardedPool)
        assert not any(isinstance(block, TaggedBlock) for block in root.record.tip.node.blocks)
