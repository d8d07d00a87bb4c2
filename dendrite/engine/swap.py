"""Where the K/V of idle nodes goes when the pool is too small: host memory, then disk, and last of all nowhere.

    pool ── put ──► host memory ── when that is full, the oldest ──► disk ── when that is full ──► lost
      ▲                  │                                            │                             │
      └──────────────── take: the very same bits ─────────────────────┘      computed again ◄───────┘

Nothing here can fail a request: what cannot be kept, for want of room or because a disk is full or broken, is lost, and
whoever needs it computes it again from its tokens. So is a file that does not hold what was written, and with sums a
copy in memory that has changed. The tensors are moved by a `KVMover`; this room only decides.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dendrite.engine.files import WorkFolder, remove_abandoned
from dendrite.engine.ids import BlockId

Spans = Sequence[tuple[int, int]]
"""Ranges of slots `[first, last)`, in order."""


_PREFIX = "dendrite-swap-"


class KVMover(Protocol):
    """Moves K/V between the pool, host memory and files; lives where the tensors do.

    Calls take effect in the order they are made, also on a device that runs behind.
    """

    def save(self, spans: Spans) -> object:
        """A copy in host memory of the K/V in those slots."""

    def load(self, saved: object, slots: Sequence[int]) -> None:
        """Puts the leading tokens of what `save` or `read` returned into those slots."""

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copies whole blocks, `(source, destination)`."""

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        """A number for each block that tells its K/V from any other with one bit changed."""

    def checksum(self, saved: object) -> int:
        """A number that tells a copy from any other with one bit changed; waits until the copy is there."""

    def write(self, saved: object, path: Path) -> None:
        """Writes a copy to a file. Raises `OSError` where that is impossible."""

    def read(self, path: Path) -> object:
        """The copy in a file. Raises `OSError` or `ValueError` if it is damaged."""

    def settle(self) -> None:
        """Waits until the host can read all copies."""


@dataclass(eq=False, slots=True)
class Stored:
    """The K/V of a node's first `num_tokens` tokens, out of the pool."""

    num_tokens: int
    num_bytes: int
    number: int
    saved: object | None
    """The copy in host memory, if it is there."""
    path: Path | None = None
    """The file, if it is there."""
    checksum: int | None = None
    """Of the copy; a file has one always."""

    @property
    def is_lost(self) -> bool:
        """Whether it has to be computed again."""
        return self.saved is None and self.path is None


class SwapSpace:
    """Room for stored K/V: `host_bytes` of memory, then `disk_bytes` of files in a folder made below `folder`.

    With `has_sums` copies in memory are summed, and compared when they are needed, as files always are.
    """

    def __init__(
        self,
        mover: KVMover,
        *,
        bytes_per_token: int,
        host_bytes: int,
        disk_bytes: int = 0,
        folder: Path | None = None,
        has_sums: bool = False,
    ) -> None:
        self.mover = mover
        self.host_used = 0
        self.disk_used = 0
        self.num_tokens_out = 0
        self.num_tokens_in = 0
        self.num_tokens_lost = 0
        self._bytes_per_token = bytes_per_token
        self._host_bytes = host_bytes
        self._disk_bytes = disk_bytes
        self._parent = folder
        self._has_sums = has_sums
        self._folder: WorkFolder | None = None
        self._in_host: OrderedDict[int, Stored] = OrderedDict()  # by number, oldest first
        self._numbers = itertools.count()

    def put(self, spans: Spans, num_tokens: int) -> Stored:
        """Takes a copy; what there is no room for is lost, the oldest first."""
        size = num_tokens * self._bytes_per_token
        stored = Stored(num_tokens, size, next(self._numbers), None)
        self.num_tokens_out += num_tokens
        if size > max(self._host_bytes, self._disk_bytes):
            self.num_tokens_lost += num_tokens
            return stored
        try:
            stored.saved = self.mover.save(spans)
        except (MemoryError, RuntimeError):  # torch's own out-of-memory errors are the latter
            self.num_tokens_lost += num_tokens
            return stored
        self._keep(stored)
        return stored

    def adopt(self, saved: object, num_tokens: int) -> Stored:
        """Keeps a copy that came from elsewhere, as `put` keeps those it makes."""
        stored = Stored(num_tokens, num_tokens * self._bytes_per_token, next(self._numbers), saved)
        self._keep(stored)
        return stored

    def peek(self, stored: Stored) -> object | None:
        """The copy, which stays where it is; None if it is lost."""
        saved = stored.saved
        try:
            if stored.path is not None:
                saved = self.mover.read(stored.path)
        except (OSError, ValueError):
            return None
        is_sound = saved is None or stored.checksum is None or self.mover.checksum(saved) == stored.checksum
        return saved if is_sound else None

    def take(self, stored: Stored, slots: Sequence[int]) -> bool:
        """Puts it back into the pool and forgets it; False if it was lost."""
        was_lost, saved = stored.is_lost, self.peek(stored)
        self.drop(stored)
        if saved is None:
            self.num_tokens_lost += 0 if was_lost else stored.num_tokens
            return False
        self.mover.load(saved, slots)
        self.num_tokens_in += len(slots)
        return True

    def drop(self, stored: Stored) -> None:
        """Forgets it."""
        self._leave_host(stored)
        if stored.path is not None:
            self.disk_used -= stored.num_bytes
            stored.path.unlink(missing_ok=True)
            stored.path = None

    def close(self) -> None:
        """Removes every file."""
        self._in_host.clear()
        if self._folder is not None:
            self._folder.remove()

    def _keep(self, stored: Stored) -> None:
        if self._has_sums:
            stored.checksum = self.mover.checksum(stored.saved)
        self._in_host[stored.number] = stored
        self.host_used += stored.num_bytes
        while self.host_used > self._host_bytes:
            self._spill(next(iter(self._in_host.values())))

    def _spill(self, stored: Stored) -> None:
        """From host memory to disk, or to nowhere."""
        saved = stored.saved
        self._leave_host(stored)
        if self.disk_used + stored.num_bytes <= self._disk_bytes:
            path: Path | None = None
            try:
                path = self._file(stored.number)
                if stored.checksum is None:
                    stored.checksum = self.mover.checksum(saved)
                self.mover.write(saved, path)
                stored.path = path
                self.disk_used += stored.num_bytes
                return
            except (OSError, MemoryError, RuntimeError):  # a full or broken disk is no reason to fail a request
                if path is not None:
                    path.unlink(missing_ok=True)
        self.num_tokens_lost += stored.num_tokens

    def _leave_host(self, stored: Stored) -> None:
        if self._in_host.pop(stored.number, None) is not None:
            self.host_used -= stored.num_bytes
            stored.saved = None

    def _file(self, number: int) -> Path:
        if self._folder is None:
            remove_abandoned(self._parent, _PREFIX)
            self._folder = WorkFolder(self._parent, _PREFIX)
        return self._folder.path / f"{number}.safetensors"
