"""Single checkpoints taken out of a saver, for which LangGraph's own have no way: one class a saver."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from dendrite.engine.errors import RequestError


class Place(NamedTuple):
    """Where a checkpoint is."""

    thread_id: str
    namespace: str
    checkpoint_id: str


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
    """Of a `SqliteSaver`: one transaction."""

    def __init__(self, saver: BaseCheckpointSaver[str]) -> None:
        self._saver = saver

    def remove(self, places: Collection[Place]) -> None:
        """See `Rows.remove`."""
        with self._saver.cursor() as cursor:  # type: ignore[attr-defined]  # only SqliteSaver comes here
            for table in ("checkpoints", "writes"):
                cursor.executemany(
                    f"DELETE FROM {table} WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?",  # noqa: S608 - two fixed names
                    list(places),
                )


def rows_of(saver: BaseCheckpointSaver[str]) -> Rows:
    """The rows of a saver.

    Raises:
        RequestError: a saver of a kind that is not known here.
    """
    if isinstance(saver, InMemorySaver):
        return MemoryRows(saver)
    if type(saver).__name__ == "SqliteSaver":  # its package is optional
        return SqliteRows(saver)
    raise RequestError(
        f"TimeTravelSaver wraps an InMemorySaver or a SqliteSaver, not a {type(saver).__name__}: in place "
        "of an AsyncSqliteSaver give a SqliteSaver, which the wrapper runs in threads"
    )
