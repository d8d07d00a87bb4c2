"""The tokens that a saver's checkpoints name, each path once, beside the checkpoints.

    dendrite_tokens   model, digest ──► tokens                     a path of 2,000 tokens: some kilobytes, once
    dendrite_held     checkpoint ──► model, digest                 who names it; the last one to go takes it along

So a checkpoint holds a reference of some sixty characters for each branch, whatever its length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from dendrite.integrations.langgraph.databases import Database, Statement

_TOKENS = """
CREATE TABLE IF NOT EXISTS dendrite_tokens (
    model TEXT NOT NULL, digest TEXT NOT NULL, tokens BLOB NOT NULL,
    PRIMARY KEY (model, digest)
)"""
_HELD = """
CREATE TABLE IF NOT EXISTS dendrite_held (
    thread_id TEXT NOT NULL, checkpoint_ns TEXT NOT NULL, checkpoint_id TEXT NOT NULL,
    model TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (thread_id, checkpoint_ns, checkpoint_id, model, digest)
)"""
_HELD_INDEX = "CREATE INDEX IF NOT EXISTS dendrite_held_tokens ON dendrite_held (model, digest)"
_SCHEMA: list[Statement] = [(sql, [()]) for sql in (_TOKENS, _HELD, _HELD_INDEX)]

_COPY = """
INSERT OR IGNORE INTO dendrite_held SELECT ?, checkpoint_ns, checkpoint_id, model, digest
FROM dendrite_held WHERE thread_id = ?"""
_DROP_UNHELD = """
DELETE FROM dendrite_tokens WHERE NOT EXISTS (
    SELECT 1 FROM dendrite_held AS held
    WHERE held.model = dendrite_tokens.model AND held.digest = dendrite_tokens.digest
) RETURNING model, digest"""


class Place(NamedTuple):
    """Where a checkpoint is."""

    thread_id: str
    namespace: str
    checkpoint_id: str


class TokenKey(NamedTuple):
    """What names a path of tokens."""

    model: str
    digest: str


class TokenTable:
    """The two tables of one saver."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def hold(self, place: Place, tokens: Mapping[TokenKey, bytes]) -> None:
        """A checkpoint names these paths."""
        self._database.run(
            [
                *_SCHEMA,
                (
                    "INSERT OR IGNORE INTO dendrite_tokens VALUES (?, ?, ?)",
                    [(*key, data) for key, data in tokens.items()],
                ),
                ("INSERT OR IGNORE INTO dendrite_held VALUES (?, ?, ?, ?, ?)", [(*place, *key) for key in tokens]),
            ]
        )

    def read(self, keys: Collection[TokenKey]) -> dict[TokenKey, bytes]:
        """The tokens of those paths that are here."""
        select = "SELECT model, digest, tokens FROM dendrite_tokens WHERE model = ? AND digest = ?"
        rows = self._database.run([*_SCHEMA, (select, list(keys))])
        return {TokenKey(model, digest): data for model, digest, data in rows}

    def copy_thread(self, source: str, target: str) -> None:
        """Checkpoints of the target name what those of the source do."""
        self._database.run([*_SCHEMA, (_COPY, [(target, source)])])

    def release(self, places: Collection[Place]) -> list[TokenKey]:
        """These checkpoints are gone; the paths that nobody names any more, which are gone too."""
        delete = "DELETE FROM dendrite_held WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
        return self._release((delete, list(places)))

    def release_thread(self, thread_id: str) -> list[TokenKey]:
        """All checkpoints of a thread are gone; as `release`."""
        return self._release(("DELETE FROM dendrite_held WHERE thread_id = ?", [(thread_id,)]))

    def _release(self, delete: Statement) -> list[TokenKey]:
        return [TokenKey(*row) for row in self._database.run([*_SCHEMA, delete, (_DROP_UNHELD, [()])])]
