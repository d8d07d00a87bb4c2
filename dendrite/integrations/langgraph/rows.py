"""Single checkpoints taken out of a saver, for which LangGraph's own have no way: one class a saver."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from dendrite.engine.errors import RequestError
from dendrite.integrations.langgraph.databases import AsyncSaverDatabase, Database, MemoryDatabase, SaverDatabase
from dendrite.integrations.langgraph.token_table import Place


class Rows(Protocol):
    """Removes checkpoints, with their writes, all of them or none."""

    def remove(self, places: Collection[Place]) -> None:
        """Take them out; what is not there is left alone."""


class MemoryRows:
    """Of an `InMemorySaver`."""

    def __init__(self, saver: InMemorySaver) -> None:
        self._saver = saver

    def remove(self, places: Collection[Place]) -> None:
        """See `Rows.remove`; values that no checkpoint refers to any more go too."""
        for place in places:
            self._saver.storage[place.thread_id][place.namespace].pop(place.checkpoint_id, None)
            self._saver.writes.pop((place.thread_id, place.namespace, place.checkpoint_id), None)
        for thread_id, namespace in {place[:2] for place in places}:
            self._drop_values(thread_id, namespace)

    def _drop_values(self, thread_id: str, namespace: str) -> None:
        left = self._saver.storage[thread_id][namespace].values()
        used = {item for saved in left for item in self._saver.serde.loads_typed(saved[0])["channel_versions"].items()}
        for key in [key for key in self._saver.blobs if key[:2] == (thread_id, namespace) and key[2:] not in used]:
            del self._saver.blobs[key]


class SqliteRows:
    """Of a saver over SQLite: one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def remove(self, places: Collection[Place]) -> None:
        """See `Rows.remove`."""
        where = "WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
        self._database.run([(f"DELETE FROM {table} {where}", list(places)) for table in ("checkpoints", "writes")])  # noqa: S608 - two fixed names


def storage_of(saver: BaseCheckpointSaver[str]) -> tuple[Rows, Database]:
    """The rows of a saver, and where tables beside them go.

    Raises:
        RequestError: a saver of a kind that is not known here.
    """
    if isinstance(saver, InMemorySaver):
        return MemoryRows(saver), MemoryDatabase()
    make = _DATABASES.get(type(saver).__name__)  # by name, since their package is optional
    if make is None:
        raise RequestError(
            "TimeTravelSaver wraps an InMemorySaver, a SqliteSaver or an AsyncSqliteSaver, not a "
            f"{type(saver).__name__}: give it one of those, or use your saver as it is: handles in it are whole"
        )
    database = make(saver)
    return SqliteRows(database), database


_DATABASES: dict[str, Callable[[BaseCheckpointSaver[str]], Database]] = {
    "SqliteSaver": SaverDatabase,
    "AsyncSqliteSaver": AsyncSaverDatabase,
}
