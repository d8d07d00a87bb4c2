"""One way to run SQL for the savers whose checkpoints are in SQLite, or nowhere but in memory."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Protocol

from langgraph.checkpoint.base import BaseCheckpointSaver

from dendrite.engine.errors import RequestError

Row = tuple[Any, ...]
Statement = tuple[str, Sequence[Row]]
"""SQL, and the rows of parameters that it is run with, one after the other."""


class Database(Protocol):
    """Where a saver's own tables are, and ours beside them."""

    def run(self, statements: Sequence[Statement]) -> list[Row]:
        """Run all of them in one transaction; what they return, in order."""


class MemoryDatabase:
    """A database of its own, gone with the process."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._lock = threading.Lock()

    def run(self, statements: Sequence[Statement]) -> list[Row]:
        """See `Database.run`."""
        with self._lock, self._connection, closing(self._connection.cursor()) as cursor:
            return _run(cursor, statements)

    def __del__(self) -> None:
        self._connection.close()


class SaverDatabase:
    """That of a `SqliteSaver`."""

    def __init__(self, saver: BaseCheckpointSaver[str]) -> None:
        self._saver: Any = saver  # its package is optional

    def run(self, statements: Sequence[Statement]) -> list[Row]:
        """See `Database.run`."""
        with self._saver.cursor() as cursor:
            try:
                return _run(cursor, statements)
            except BaseException:
                self._saver.conn.rollback()
                raise


class AsyncSaverDatabase:
    """That of an `AsyncSqliteSaver`, whose connection belongs to its event loop; called from other threads."""

    def __init__(self, saver: BaseCheckpointSaver[str]) -> None:
        self._saver: Any = saver  # as for `SaverDatabase`

    def run(self, statements: Sequence[Statement]) -> list[Row]:
        """See `Database.run`.

        Raises:
            RequestError: called on the event loop itself, which would wait for ever.
        """
        try:
            is_own_loop = asyncio.get_running_loop() is self._saver.loop
        except RuntimeError:
            is_own_loop = False
        if is_own_loop:
            raise RequestError(
                "an AsyncSqliteSaver serves async calls: use ainvoke, aget_state, adelete_thread and so on"
            )
        return asyncio.run_coroutine_threadsafe(self._arun(statements), self._saver.loop).result()

    async def _arun(self, statements: Sequence[Statement]) -> list[Row]:
        await self._saver.setup()
        found: list[Row] = []
        async with self._saver.lock, self._saver.conn.cursor() as cursor:
            try:
                for sql, rows in statements:
                    for row in rows:
                        await cursor.execute(sql, row)
                        found += await cursor.fetchall()
            except BaseException:
                await self._saver.conn.rollback()
                raise
            await self._saver.conn.commit()
        return found


def _run(cursor: sqlite3.Cursor, statements: Sequence[Statement]) -> list[Row]:
    found: list[Row] = []
    for sql, rows in statements:
        for row in rows:
            cursor.execute(sql, row)
            found += cursor.fetchall()
    return found
