"""What the KV tree is made of: nodes, and the tips that hold them."""

from __future__ import annotations

from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.states import Status
from dendrite.engine.swap import Stored

HiddenRow = tuple[object, int]
"""A step's hidden rows, opaque here, and an index into them."""


class KVNode:
    """A run of tokens with the blocks that hold their K/V. Offsets count from the node's own first token."""

    __slots__ = (
        "attached",
        "blocks",
        "children",
        "epoch",
        "hidden",
        "is_live",
        "last_used",
        "node_id",
        "num_computed",
        "num_placed",
        "offset",
        "parent",
        "spans",
        "start",
        "stored",
        "token_ids",
        "writer",
    )

    def __init__(self, node_id: NodeId, parent: KVNode | None, offset: int) -> None:
        self.node_id = node_id
        self.parent = parent
        self.offset = offset  # of the parent's tokens, how many come before this node
        self.start: int = parent.start + offset if parent else 0  # absolute position of the first own token
        self.token_ids: list[int] = []
        self.num_placed = 0  # leading tokens that have slots
        self.num_computed = 0  # leading tokens whose K/V is in them
        self.blocks: list[BlockId] = []  # blocks[0] covers absolute position `start`
        self.attached: dict[int, int] = {}  # offset -> how many tips and child nodes are attached there
        self.writer: Tip | None = None
        self.children: dict[NodeId, KVNode] = {}
        self.hidden: dict[
            int, HiddenRow
        ] = {}  # offset -> final hidden row after the token before it; see `keep_hidden`
        self.spans: list[tuple[int, int, int]] | None = None  # cache of `KVTree.spans`
        self.epoch = 0  # counts roll-backs, so that a step in flight knows its tokens are gone
        self.is_live = True
        self.stored: Stored | None = None  # the K/V, while it is out of the pool
        self.last_used = 0  # the step that computed for it last

    def keep_hidden(self, offset: int, row: HiddenRow) -> None:
        """Keeps the first row, where a prompt ended and others begin, and the latest, where the writer goes on."""
        while len(self.hidden) > 1:
            self.hidden.popitem()
        self.hidden[offset] = row

    @property
    def ref_count(self) -> int:
        """Tips and child nodes that hold this node."""
        return sum(self.attached.values()) + (self.writer is not None)


class Tip:
    """Where a branch ends: after `offset` tokens of `node`."""

    __slots__ = ("depth", "node", "num_ahead", "offset", "status", "value")

    def __init__(self, node: KVNode, offset: int) -> None:
        self.node = node
        self.offset = offset
        self.num_ahead = 0  # last tokens that are drawn but not known yet; see `KVTree.look_ahead`
        self.status: Status = "idle"
        self.depth: int | None = None  # in the user's tree; None for what no user holds
        self.value: float | None = None  # what the user thinks of it; the least valuable leave a full pool first

    @property
    def length(self) -> int:
        """Number of tokens from the root to here."""
        return self.node.start + self.offset

    @property
    def num_known(self) -> int:
        """Number of tokens from the root to here that are known: all that anybody but the step loop may see."""
        return self.length - self.num_ahead
