"""The identifiers that cross a room's door, one `NewType` each, so that a checker tells them apart."""

from typing import NewType

BlockId = NewType("BlockId", int)
NodeId = NewType("NodeId", int)
BranchId = NewType("BranchId", int)
RequestId = NewType("RequestId", int)

TRASH_BLOCK = BlockId(0)
"""The block nobody owns: rows whose K/V must not be kept (a recomputed or padded token) write here."""
