"""From the tree to a snapshot and back.

What comes back does not take a block: its nodes stand in the tree as if they had left a full pool, with their K/V in
the swap space, and go into the pool with the step that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.record import BranchRecord
from dendrite.engine.snapshot import SavedBranch, SavedNode, Snapshot
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree

Entry = tuple[BranchRecord, float | None, int | None]
"""A branch, the user's value of it, and the index of its parent among the entries before it."""


class Archive:
    """Captures branches of one tree, and puts them back. The engine's lock is held."""

    def __init__(self, tree: KVTree, swap: SwapSpace, model: str) -> None:
        self._tree = tree
        self._swap = swap
        self._model = model

    def capture(self, entries: Sequence[Entry], *, kv: bool) -> Snapshot:
        """A copy of the branches and of all that lies above them."""
        upto = self._nodes_needed([record.tip for record, _, _ in entries])
        index_of = {id(node): index for index, (node, _) in enumerate(upto)}
        nodes = [
            SavedNode(
                parent=index_of[id(node.parent)] if node.parent is not None else None,
                offset=node.offset,
                token_ids=node.token_ids[:last],
                kv=self._copy_of(node, last) if kv else None,
            )
            for node, last in upto
        ]
        branches = [
            SavedBranch(
                parent=parent,
                node=index_of[id(record.tip.node)],
                offset=record.tip.offset,
                depth=record.tip.depth or 0,
                salt=record.salt,
                key=record.key,
                num_forks=record.num_forks,
                logprobs=list(record.logprobs),
                value=value,
                chat=record.chat,
            )
            for record, value, parent in entries
        ]
        return Snapshot(self._model, nodes, branches)

    def rebuild(self, snapshot: Snapshot) -> list[BranchRecord]:
        """The branches, in the order they were captured. If anything fails, nothing of them is left."""
        starts: list[int] = []
        tips: list[Tip] = []
        records: list[BranchRecord] = []
        try:
            for node in snapshot.nodes:
                starts.append(starts[node.parent] + node.offset if node.parent is not None else 0)
                tips.append(self._put_back(node, starts[-1], tips))
            records.extend(
                self._record(saved, tips[saved.node], starts[saved.node] + saved.offset) for saved in snapshot.branches
            )
        except BaseException:
            for record in records:
                self._tree.prune(record.tip)
            raise
        finally:
            for tip in reversed(tips):
                self._tree.prune(tip)
        return records

    def _put_back(self, saved: SavedNode, start: int, tips: Sequence[Tip]) -> Tip:
        """A tip at the end of the saved run, which begins at position `start`, on whatever of it is there already."""
        if saved.parent is None:
            tip, shared = self._tree.new_root(saved.token_ids, most_revived=0)
        else:
            above, shared = tips[saved.parent], 0
            tip = self._tree.fork(above, at=start if start < above.length else None)
            self._tree.extend(tip, saved.token_ids)
        is_new = tip.node.start == start + shared and tip.node.num_placed == 0
        if saved.kv is not None and shared < saved.kv.shape[3] and is_new:  # what joined another node is computed again
            kv = saved.kv[:, :, :, shared:].clone() if shared else saved.kv
            tip.node.stored = self._swap.adopt(kv, kv.shape[3])
        return tip

    def _record(self, saved: SavedBranch, tip: Tip, position: int) -> BranchRecord:
        branch = self._tree.fork(tip, at=position if position < tip.length else None)
        branch.depth = saved.depth
        chat = (tuple(saved.chat[0]), saved.chat[1]) if saved.chat is not None else None
        record = BranchRecord(branch, salt=saved.salt, key=saved.key, chat=chat)
        record.num_forks = saved.num_forks
        record.logprobs = list(saved.logprobs)
        return record

    def _nodes_needed(self, tips: Sequence[Tip]) -> list[tuple[KVNode, int]]:
        """Every node on the tips' paths with how many of its tokens they need, parents first."""
        needed: dict[int, tuple[KVNode, int]] = {}
        for tip in tips:
            node: KVNode | None = tip.node
            offset = tip.offset
            while node is not None and needed.get(id(node), (node, -1))[1] < offset:
                needed[id(node)] = (node, offset)
                offset, node = node.offset, node.parent
        return sorted(needed.values(), key=lambda pair: (pair[0].start, pair[0].node_id))

    def _copy_of(self, node: KVNode, last: int) -> Tensor | None:
        """The K/V of the node's first `last` tokens, as many as are computed."""
        if node.stored is not None:
            saved, num = self._swap.peek(node.stored), node.stored.num_tokens
        elif node.num_computed:
            num = min(last, node.num_computed)
            saved = self._swap.mover.save(self._tree.spans(node, 0, num))
        else:
            return None
        if saved is None:
            return None
        assert isinstance(saved, Tensor)
        self._swap.mover.settle()
        return saved[:, :, :, : min(num, last)]
