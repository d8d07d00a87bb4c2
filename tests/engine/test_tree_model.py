"""The tree against a list-of-tokens model: random programs, every branch's tokens read back through plan and slots.

The "K/V" of a token is the token itself, written to its slot when a step computes it and moved by copy-on-write. What
a row reads through its plan must then be its path: a wrong slot, a missing copy or a stale segment shows as a wrong
token.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from dendrite.engine.archive import Archive
from dendrite.engine.attention.page_tables import requests_of
from dendrite.engine.batch import Plan, Segment
from dendrite.engine.blocks import BlockPool
from dendrite.engine.demand import demand
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.plan import Planner, Run, plan_runs
from dendrite.engine.pressure import Pressure
from dendrite.engine.record import BranchRecord
from dendrite.engine.requests import GenerateRequest, Request, ScoreRequest
from dendrite.engine.step import StepBuilder
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree
from tests.engine.list_mover import ListMover

TOKENS = st.integers(0, 5)


def path_of(tip: Tip) -> list[KVNode]:
    """The nodes from the tip's up to the root."""
    path = [tip.node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path


class CheckedPlanner(Planner):
    """A plan that was lengthened is the one that would have been made."""

    def plan(self, runs: Sequence[Run]) -> tuple[list[Run], Plan]:
        found = super().plan(runs)
        assert found == plan_runs(self._tree, runs)
        return found


class TreeMachine(RuleBasedStateMachine):
    """Forks, appends, roll-backs, prunes and steps; after each, tokens and counts must agree with the model."""

    branches = Bundle("branches")

    @initialize(block_size=st.sampled_from([1, 2, 3, 4, 8]), num_blocks=st.sampled_from([24, 60, 200]))
    def make(self, block_size: int, num_blocks: int) -> None:
        self.memory = [-1] * ((num_blocks + 1) * block_size)  # slot -> the token whose K/V lies there
        self.model: dict[Tip, list[int]] = {}
        self.swap = SwapSpace(ListMover(self.memory, block_size), bytes_per_token=1, host_bytes=30, disk_bytes=40)
        self.tree = KVTree(BlockPool(num_blocks, block_size), drop_stored=self.swap.drop)
        self.pressure = Pressure(self.tree, self.swap)
        self.planner = CheckedPlanner(self.tree)

    @rule(target=branches, tokens=st.lists(TOKENS, min_size=1, max_size=20))
    def root(self, tokens: list[int]) -> Tip:
        tip, shared = self.tree.new_root(tokens)
        assert shared <= len(tokens)
        self.model[tip] = list(tokens)
        return tip

    @precondition(lambda self: self.tree.nodes)
    @rule(target=branches, data=st.data(), tokens=st.lists(TOKENS, max_size=4), most=st.none() | st.integers(0, 3))
    def root_on_a_known_path(self, data: st.DataObject, tokens: list[int], most: int | None) -> Tip:
        """A prompt that begins like a node that is held or cached; not more cached blocks are used than allowed."""
        node = data.draw(st.sampled_from(sorted(self.tree.nodes.values(), key=lambda node: node.node_id)))
        path = self.tree.token_ids(Tip(node, data.draw(st.integers(1, len(node.token_ids))))) + tokens
        used, hits = self.tree.pool.num_used, self.tree.cache.num_hits
        tip, shared = self.tree.new_root(path, most_revived=most)
        assert most is None or self.tree.pool.num_used <= used + most
        assert (self.tree.cache.num_hits > hits) <= (shared > 0)
        self.model[tip] = list(path)
        return tip

    @precondition(lambda self: self.model)
    @rule(data=st.data(), num=st.integers(1, 30))
    def preempt(self, data: st.DataObject, num: int) -> None:
        """What the scheduler does under pressure; a step brings back what it needs."""
        some = data.draw(st.lists(st.sampled_from(list(self.model)), max_size=3, unique_by=id))
        pool = self.tree.pool
        wanted = min(pool.num_total, pool.num_available + num)
        most = pool.num_available + self.pressure.num_movable(some)
        assert self.pressure.make_room(wanted, some) == (wanted <= most)

    @rule(tip=branches, num=st.integers(1, 30))
    def preempt_all_but_one(self, tip: Tip, num: int) -> None:
        """A branch that runs keeps its path in the pool, whatever the others have to give up for it."""
        placed = [node.num_placed for node in path_of(tip)]
        self.pressure.make_room(min(self.tree.pool.num_total, self.tree.pool.num_available + num), [tip])
        assert [node.num_placed for node in path_of(tip)] == placed

    @precondition(lambda self: self.model)
    @rule(target=branches, data=st.data())
    def restore(self, data: st.DataObject) -> object:
        """Some branches are saved and come back beside themselves, as tokens that are computed again."""
        some = data.draw(st.lists(st.sampled_from(list(self.model)), min_size=1, max_size=3, unique_by=id))
        archive = Archive(self.tree, self.swap, "model")
        records = [BranchRecord(tip, salt=1, key=2, chat=None) for tip in some]
        back = archive.rebuild(archive.capture([(record, None, None) for record in records], kv=False))
        for tip, record in zip(some, back, strict=True):
            self.model[record.tip] = list(self.model[tip])
        return multiple(*(record.tip for record in back))

    @rule()
    def clear_cache(self) -> None:
        self.tree.clear_cache()
        assert self.tree.pool.num_cached == 0

    @rule(target=branches, tip=branches, data=st.data())
    def fork(self, tip: Tip, data: st.DataObject) -> Tip:
        used = self.tree.pool.num_used
        at = data.draw(st.none() | st.integers(1, tip.length))
        fork = self.tree.fork(tip, at=at)
        assert self.tree.pool.num_used == used
        self.model[fork] = self.model[tip][:at]
        return fork

    @rule(tip=branches, tokens=st.lists(TOKENS, min_size=1, max_size=9))
    def append(self, tip: Tip, tokens: list[int]) -> None:
        self.tree.extend(tip, tokens)
        self.model[tip] += tokens

    @rule(tip=branches, data=st.data())
    def roll_back(self, tip: Tip, data: st.DataObject) -> None:
        length = data.draw(st.integers(1, tip.length))
        self.tree.truncate(tip, length)
        del self.model[tip][length:]

    @rule(tip=consumes(branches), keep=st.sampled_from([True, True, True, False]))
    def prune(self, tip: Tip, *, keep: bool) -> None:
        self.tree.prune(tip, keep=keep)
        del self.model[tip]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), budget=st.integers(1, 12))
    def step(self, data: st.DataObject, budget: int) -> None:
        """What the scheduler does with some of the branches: place, copy, plan, write, read."""
        some = data.draw(st.lists(st.sampled_from(list(self.model)), min_size=1, max_size=8, unique_by=id))
        self.run_step([GenerateRequest(tip, 1) for tip in some], budget)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.lists(TOKENS, min_size=2, max_size=9))
    def decode(self, data: st.DataObject, tokens: list[int]) -> None:
        """The same branches step after step, a token each."""
        some = data.draw(st.lists(st.sampled_from(list(self.model)), min_size=1, max_size=6, unique_by=id))
        for token in tokens:
            for tip in some:
                self.tree.extend(tip, [token])
                self.model[tip].append(token)
            self.run_step([GenerateRequest(tip, 1) for tip in some], budget=12)

    @rule(tip=branches, data=st.data(), budget=st.integers(1, 12))
    def score(self, tip: Tip, data: st.DataObject, budget: int) -> None:
        """Temporary siblings, computed in as many steps as it takes; whatever was read, nothing of them stays."""
        candidates = data.draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4))
        request = ScoreRequest(self.tree.fork(tip), candidates)
        nodes = set(self.tree.nodes)
        if demand(self.tree.pool, request.demand()) <= self.tree.pool.num_available:
            request.open_siblings(self.tree)
            for _ in range(100):
                self.run_step([request], budget)
                if request.is_complete:
                    break
            assert request.is_complete
            assert all(self.tree.token_ids(sib)[tip.length :] == candidates[i][:-1] for i, sib in request.siblings)
        request.close(self.tree)
        assert set(self.tree.nodes) <= nodes

    def run_step(self, requests: list[Request], budget: int) -> None:
        """Builds one step of the requests, runs it on the list of tokens, and checks what its rows read."""
        available = self.tree.pool.num_available
        needed = demand(self.tree.pool, [entry for request in requests for entry in request.demand()])
        builder = StepBuilder(self.tree, self.pressure, self.planner)
        for request in requests:
            builder.add_request(request, budget=budget)
        step = builder.build()
        assert not step.failed or needed > available
        if step.batch is None:
            return
        batch = step.batch
        self.swap.mover.copy_blocks(batch.copies)
        for token, slot in zip(batch.token_ids, batch.slots, strict=True):
            if slot:
                self.memory[slot] = token
        runs = [run for run, _, _ in step.runs]
        self.check_reads(runs, batch.plan.segments)
        self.check_page_tables(runs, batch.plan)
        for run, epoch, _ in step.runs:
            assert run.node.epoch == epoch
            if run.is_kept:
                run.node.num_computed = run.end

    def check_reads(self, runs: list[Run], segments: Sequence[Segment]) -> None:
        """Every row reads exactly its path, in order, itself last."""
        row = 0
        for run in runs:
            for offset in range(run.start, run.end):
                read: list[int] = []
                for segment in segments:
                    if not segment.row_start <= row < segment.row_end:
                        continue
                    slots = [slot for begin, end in segment.spans for slot in range(begin, end)]
                    assert len(slots) == segment.num_keys
                    hidden = max(0, segment.causal_rows - 1 - (row - segment.row_start))
                    read += [self.memory[slot] for slot in slots[: len(slots) - hidden]]
                probe = Tip(run.node, offset + 1)
                assert read == self.tree.token_ids(probe)
                row += 1

    def check_page_tables(self, runs: list[Run], plan: Plan) -> None:
        """The same through whole blocks: pages hold the path of their request's last row, from its beginning."""
        size, ends = self.tree.pool.block_size, {}
        row = 0
        for run in runs:
            row += run.num_rows
            ends[row] = Tip(run.node, run.end)
        for request in requests_of(plan, size):
            read = [token for page in request.pages.tolist() for token in self.memory[page * size : (page + 1) * size]]
            probe = ends.get(request.row_start + request.num_rows)
            assert probe is not None, "a request ends within a run"
            assert read[: request.num_keys] == self.tree.token_ids(probe)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check_integrity()
        assert self.swap.host_used <= 30
        assert self.swap.disk_used <= 40
        for tip, tokens in self.model.items():
            assert self.tree.token_ids(tip) == tokens
        for node in self.tree.nodes.values():
            self.check_first_block(node)
            slots = self.tree.slots(node, 0, node.num_computed)
            assert [self.memory[slot] for slot in slots] == node.token_ids[: node.num_computed]
        if not self.model:
            assert self.tree.pool.num_used == 0
            assert self.swap.host_used == self.swap.disk_used == 0

    def check_first_block(self, node: KVNode) -> None:
        """A block is whole for kernels that read block tables: it starts with the tokens before the node's own."""
        if node.num_computed:
            lead = node.start % self.tree.pool.block_size
            first_slot = node.blocks[0] * self.tree.pool.block_size
            path = self.tree.token_ids(Tip(node, 1))
            assert self.memory[first_slot : first_slot + lead + 1] == path[len(path) - lead - 1 :]

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        try:
            for tip in list(self.model):
                self.tree.prune(tip)
            assert self.tree.pool.num_available == self.tree.pool.num_total
            self.tree.clear_cache()
            assert self.tree.pool.num_free == self.tree.pool.num_total
            assert self.swap.host_used == self.swap.disk_used == 0
        finally:
            self.swap.close()


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
