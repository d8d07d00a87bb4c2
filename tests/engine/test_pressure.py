"""A pool that is too small: who leaves, that the very same K/V comes back, that everything finishes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from dendrite.engine.engine import Engine
from dendrite.engine.errors import OutOfBlocks
from dendrite.engine.kv_mover import PoolMover
from dendrite.engine.pressure import Pressure
from dendrite.engine.scheduler import Scheduler
from dendrite.engine.step import Step
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree
from dendrite.testing import scripted_engine
from dendrite.testing.runner import ScriptedMover
from tests.engine.list_mover import ListMover
from tests.engine.test_tree import compute, make_tree

BYTES = 8
"""Of K/V in a token of a scripted engine."""


def reply(text: str) -> dict[str, float]:
    return {f" {len(text) % 7}abc": 3.0, f" {len(text) % 5}de": 2.0, " f": 1.0}


def search(engine: Engine, *, width: int = 8, depth: int = 4) -> list[list[int]]:
    """A beam that keeps all it ever made, so that memory grows; every branch's tokens in the end."""
    frontier = [engine.root("the plan that everything hangs on:", seed=5)]
    made = list(frontier)
    for _ in range(depth):
        children = [child for parent in frontier for child in parent.fork(max(1, width // len(frontier)))]
        for child in children:
            child.append("\nStep:")
        engine.generate(children, max_tokens=8, temperature=1.0)
        scores = {id(child): child.score([" good", " bad"])[0] for child in children}
        frontier = sorted(children, key=lambda child: scores[id(child)])[: width // 2]
        made += children
    return [branch.token_ids for branch in made]


@pytest.fixture(scope="module")
def roomy() -> tuple[list[list[int]], int]:
    """What the search finds with all the memory it likes, and how many blocks that takes."""
    with scripted_engine(reply) as engine:
        found = search(engine)
        return found, engine.stats().blocks_peak


@pytest.mark.parametrize("where", ["memory", "disk", "nowhere", "a bit of each"])
def test_a_search_in_a_quarter_of_its_memory_finds_the_same(roomy: tuple[list[list[int]], int], where: str) -> None:
    """Whether what leaves the pool is kept in memory, on disk, or computed again."""
    wanted, peak = roomy
    memory, disk = {
        "memory": (1 << 20, 0),
        "disk": (0, 1 << 20),
        "nowhere": (0, 0),
        "a bit of each": (60 * BYTES, 100 * BYTES),
    }[where]
    with scripted_engine(reply, num_blocks=peak // 4, swap_memory=memory, swap_disk=disk) as engine:
        assert search(engine) == wanted
        engine.check_integrity()
        stats = engine.stats()
        assert stats.blocks_peak <= peak // 4
        assert stats.tokens_swapped_out > 0
        assert (stats.tokens_swapped_in > 0) == (where != "nowhere")
        assert (stats.tokens_swap_lost > 0) == (where in ("nowhere", "a bit of each"))


@pytest.mark.parametrize("memory", [None, 0])
def test_a_real_model_says_the_same_under_pressure(tiny_folder: Callable[[str], Path], memory: int | None) -> None:
    """K/V that went to host memory and back, or was computed again, gives the tokens it gave before."""
    folder = str(tiny_folder("llama"))
    with Engine.load(folder, dtype="float32", block_size=8) as engine:
        wanted = search(engine)
        bytes_needed = engine.stats().blocks_peak * engine.stats().block_bytes
    with Engine.load(folder, dtype="float32", block_size=8, kv_memory=bytes_needed // 4, swap_memory=memory) as engine:
        assert search(engine) == wanted
        stats = engine.stats()
        assert (stats.tokens_swapped_in > 0) == (memory is None)
        assert stats.tokens_swapped_out > 0
        engine.check_integrity()


def test_a_full_disk_costs_time_and_nothing_else(
    roomy: tuple[list[list[int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second file cannot be written and every third cannot be read: the search finds the same."""
    wanted, peak = roomy
    calls = iter(range(100_000))
    write, read = ScriptedMover.write, ScriptedMover.read

    def full(self: ScriptedMover, saved: object, path: Path) -> None:
        write(self, saved, path)
        if next(calls) % 2:
            raise OSError(28, "No space left on device")

    def torn(self: ScriptedMover, path: Path) -> object:
        if next(calls) % 3 == 0:
            path.write_text("[[1")
        return read(self, path)

    monkeypatch.setattr(ScriptedMover, "write", full)
    monkeypatch.setattr(ScriptedMover, "read", torn)
    with scripted_engine(reply, num_blocks=peak // 4, swap_memory=0, swap_disk=1 << 20) as engine:
        assert search(engine) == wanted
        engine.check_integrity()
        assert engine.stats().tokens_swap_lost > 0
        assert engine.stats().tokens_swapped_in > 0


def test_a_file_that_has_changed_is_not_believed(
    roomy: tuple[list[list[int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that can be read and holds one other number is computed again; the search finds the same."""
    wanted, peak = roomy
    calls = iter(range(100_000))
    read = ScriptedMover.read

    def altered(self: ScriptedMover, path: Path) -> object:
        saved = read(self, path)
        assert isinstance(saved, Tensor)
        if next(calls) % 2:
            saved[0, 0, 0, -1, 0] ^= 1
        return saved

    monkeypatch.setattr(ScriptedMover, "read", altered)
    with scripted_engine(reply, num_blocks=peak // 4, swap_memory=0, swap_disk=1 << 20) as engine:
        assert search(engine) == wanted
        engine.check_integrity()
        assert engine.stats().tokens_swap_lost > 0
        assert engine.stats().tokens_swapped_in > 0


async def test_whatever_is_admitted_finishes_and_the_rest_is_refused_at_once() -> None:
    """A hundred tasks of random sizes in a pool for two or three of them: none waits for ever, none fails that fits."""
    rng = random.Random(3)
    async with scripted_engine(lambda _: "x" * 200, num_blocks=30, swap_memory=300 * BYTES) as engine:
        root = engine.root("shared start")

        async def work(length: int, num_tokens: int) -> str:
            with root.fork() as branch:
                branch.append("y" * length)
                out = await branch.agenerate(max_tokens=num_tokens)
                await branch.ascore([" one", " two and three"])
                return str(out.finish_reason)

        sizes = [(rng.randint(0, 40), rng.randint(1, 30)) for _ in range(99)]
        tasks = [asyncio.create_task(work(*size)) for size in sizes]
        too_large = asyncio.create_task(work(60, 80))
        async with asyncio.timeout(120):
            assert set(await asyncio.gather(*tasks)) == {"length"}
            with pytest.raises(OutOfBlocks):
                await too_large
        engine.check_integrity()
        root.prune()
        assert engine.stats().blocks_used == 0
        assert engine.stats().swap_memory_used == 0


def test_the_least_recently_used_leaves_go_first_and_parents_after_them() -> None:
    """Three leaves below one node: the order of their last use decides, and the node stays while one is there."""
    tree, pressure = small_tree()
    root, _ = tree.new_root([1, 2, 3, 4])
    leaves = [tree.fork(root) for _ in range(3)]
    for index, leaf in enumerate(leaves):
        tree.extend(leaf, [10 + index] * 4)
        compute(tree, leaf)
    for when, index in enumerate((1, 0, 2), start=1):
        leaves[index].node.last_used = when
    gone = []
    for wanted in range(tree.pool.num_available + 1, tree.pool.num_total + 1):
        assert pressure.make_room(wanted, [])
        gone.append([leaf.node.stored is not None for leaf in leaves] + [root.node.stored is not None])
    assert gone == [
        [False, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    tree.check_integrity()


def test_the_least_valuable_branches_go_first() -> None:
    """Whenever they were used; a parent is worth its best child, and a branch without a value is kept longest."""
    tree, pressure = small_tree()
    root, _ = tree.new_root([1, 2, 3, 4])
    leaves = [tree.fork(root) for _ in range(4)]
    for index, (leaf, value) in enumerate(zip(leaves, (0.5, None, 0.1, 0.9), strict=True)):
        leaf.value = value
        tree.extend(leaf, [10 + index] * 4)
        compute(tree, leaf)
        leaf.node.last_used = index
    twig = tree.fork(leaves[2])
    twig.value = 0.7
    tree.extend(twig, [20] * 4)
    compute(tree, twig)
    gone: list[int] = []
    nodes = [*(leaf.node for leaf in leaves), twig.node, root.node]
    for wanted in range(tree.pool.num_available + 1, tree.pool.num_total + 1):
        assert pressure.make_room(wanted, [])
        gone += [index for index, node in enumerate(nodes) if node.stored is not None and index not in gone]
    assert gone == [0, 4, 2, 3, 1, 5]
    tree.check_integrity()


@pytest.mark.parametrize("swap_memory", [None, 0])
def test_running_out_in_the_middle_of_decoding_sends_branches_back_to_the_queue(
    monkeypatch: pytest.MonkeyPatch, swap_memory: int | None
) -> None:
    """Admission never lets that happen; without it, ten branches in a pool for three still end with their own texts."""

    def all_of_it(engine: Engine) -> list[str]:
        kids = engine.root("the plan that everything hangs on:", seed=5).fork(10)
        return [out.text for out in engine.generate(kids, max_tokens=40, temperature=1.0, ignore_eos=True)]

    def long_reply(text: str) -> dict[str, float]:
        return {chr(97 + (len(text) * step) % 26) * 50: 1.0 for step in (3, 5, 7)}

    with scripted_engine(long_reply) as engine:
        wanted = all_of_it(engine)
    num_preempted = 0
    preempt = Scheduler._preempt

    def counted(self: Scheduler, step: Step) -> bool:
        nonlocal num_preempted
        has_preempted = preempt(self, step)
        num_preempted += has_preempted
        return has_preempted

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    monkeypatch.setattr(Scheduler, "_demand_with", lambda self, chosen: 0)
    with scripted_engine(long_reply, num_blocks=40, swap_memory=swap_memory) as engine:
        assert all_of_it(engine) == wanted
        assert num_preempted > 3
        assert engine.stats().tokens_swapped_out > 0
        engine.check_integrity()


def test_a_path_that_is_busy_stays() -> None:
    """Room is made beside it, or not at all."""
    tree, pressure = small_tree()
    root, _ = tree.new_root([1, 2, 3, 4])
    a, b = tree.fork(root), tree.fork(root)
    for tip, token in ((a, 5), (b, 6)):
        tree.extend(tip, [token] * 4)
        compute(tree, tip)
    assert not pressure.make_room(tree.pool.num_total, [a])
    assert (a.node.stored, root.node.stored) == (None, None)
    assert b.node.stored is not None
    assert pressure.num_movable([a]) == 0


def test_a_pruned_branch_takes_its_copy_along(tmp_path: Path) -> None:
    """Neither memory nor files stay behind."""
    mover = ListMover([-1] * 260, 4)
    swap = SwapSpace(mover, bytes_per_token=1, host_bytes=4, disk_bytes=100, folder=tmp_path)
    tree = make_tree()
    tree = KVTree(tree.pool, drop_stored=swap.drop)
    tips = []
    for token in range(3):
        tip, _ = tree.new_root([token] * 4)
        compute(tree, tip)
        tips.append(tip)
    Pressure(tree, swap).make_room(tree.pool.num_total, [])
    assert (swap.host_used, swap.disk_used) == (4, 8)
    for tip in tips:
        tree.prune(tip)
    assert (swap.host_used, swap.disk_used) == (0, 0)
    assert not list(tmp_path.rglob("*.safetensors"))
    swap.close()
    assert not list(tmp_path.iterdir())


def test_a_file_comes_back_bit_for_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """bfloat16 too; a damaged one is an error that the swap space understands."""
    import torch

    from dendrite.engine.kv_pool import KVPool
    from dendrite.engine.spec import ModelSpec

    spec = ModelSpec("tiny", 2, 2, 2, 8, 16, 10, 64, "bfloat16")
    pool = KVPool(spec, num_blocks=8, block_size=4, device=torch.device("cpu"))
    pool.data.copy_(torch.randn(pool.data.shape))
    before = pool.data.clone()
    mover = PoolMover(pool)
    saved = mover.save([(4, 9), (20, 22)])
    mover.write(saved, tmp_path / "kv.safetensors")
    mover.load(mover.read(tmp_path / "kv.safetensors"), [24, 25, 26, 27, 28, 30])
    assert torch.equal(pool.data[:, :, :, 24:29], before[:, :, :, 4:9])
    assert torch.equal(pool.data[:, :, :, 30], before[:, :, :, 20])
    assert torch.equal(pool.data[:, :, :, 29], before[:, :, :, 29])
    (tmp_path / "kv.safetensors").write_bytes((tmp_path / "kv.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        mover.read(tmp_path / "kv.safetensors")


def small_tree() -> tuple[KVTree, Pressure]:
    """A tree and what makes room in it, its K/V a list."""
    tree = make_tree()
    mover = ListMover([-1] * 260, 4)
    swap = SwapSpace(mover, bytes_per_token=1, host_bytes=100)
    return tree, Pressure(tree, swap)
