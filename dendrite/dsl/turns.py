"""Turns: what runs at the same time, but must pass one point in the order it was asked."""

from __future__ import annotations

import asyncio


class Turn:
    """A place in a line. `come` returns when all before it have ended theirs; whoever holds one must `end` it."""

    def __init__(self, before: Turn | None) -> None:
        self._before = before
        self.is_over = asyncio.Event()

    async def come(self) -> None:
        """Wait for those before."""
        while self._before is not None:
            before, self._before = self._before, None  # a long line is let go of, link by link
            await before.is_over.wait()

    def end(self) -> None:
        """Let the next one come; calling again is fine."""
        self.is_over.set()
