"""A mover over a list that holds a token where its K/V would be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dendrite.engine.ids import BlockId
from dendrite.engine.swap import Spans


class ListMover:
    """`dendrite.engine.swap.KVMover` over `memory`, slot by slot."""

    def __init__(self, memory: list[int], block_size: int) -> None:
        self.memory = memory
        self._size = block_size

    def save(self, spans: Spans) -> object:
        return [token for first, last in spans for token in self.memory[first:last]]

    def load(self, saved: object, slots: Sequence[int]) -> None:
        assert isinstance(saved, list)
        for slot, token in zip(slots, saved, strict=False):
            self.memory[slot] = token

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        for source, target in copies:
            self.memory[target * self._size : (target + 1) * self._size] = self.memory[
                source * self._size : (source + 1) * self._size
            ]

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        return [hash(tuple(self.memory[block * self._size : (block + 1) * self._size])) for block in block_ids]

    def checksum(self, saved: object) -> int:
        assert isinstance(saved, list)
        return hash(tuple(saved))

    def settle(self) -> None:
        """Nothing runs behind."""

    def write(self, saved: object, path: Path) -> None:
        path.write_text(json.dumps(saved))

    def read(self, path: Path) -> object:
        saved: object = json.loads(path.read_text())
        return saved
