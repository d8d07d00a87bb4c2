"""Branches that checkpoints hold: their K/V stays as long as the checkpoint does and memory allows.

    checkpoint ── names ──► (model, digest) ── lease ──► an idle branch: counted in `engine.stats()`, never pinned

An idle branch keeps its K/V from the cache's oldest-first eviction. When what runs needs the pool, the K/V of idle
branches leaves it, that of leases before any that a program holds, for host memory or for good; nothing waits for one.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import EngineError, RequestError
from dendrite.integrations.engines import ENGINES, EngineSettings, Lease
from dendrite.integrations.langgraph.handles import Snapshot
from dendrite.integrations.langgraph.token_table import TokenKey


class Leases:
    """The branches that one saver's checkpoints hold on one engine, at most `most` of them."""

    def __init__(self, engine: Engine | str | None, most: int) -> None:
        if most < 0:
            raise RequestError(f"most_leases={most} cannot be used: give 0 or more")
        self._source = engine
        self._most = most
        self._engine: Lease | None = None  # of an engine that goes by a name
        self._branches: OrderedDict[TokenKey, Branch] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._branches)

    def hold(self, paths: Iterable[tuple[TokenKey, Snapshot]]) -> None:
        """Holds what the engine has of these paths; an engine that cannot does without."""
        with self._lock:
            self._on()
            for key, snapshot in paths:
                if key in self._branches:
                    self._branches.move_to_end(key)
                elif (branch := self._opened(snapshot)) is not None:
                    self._branches[key] = branch
            while len(self._branches) > self._most:
                self._branches.popitem(last=False)[1].prune()

    def keep_kv(self, paths: Iterable[Snapshot]) -> int:
        """Puts the K/V of these paths into the engine's folder of prefixes; the tokens that had to be computed.

        Raises:
            RequestError: there is no engine, or it has no folder.
            SnapshotError: the folder cannot be written to.
        """
        with self._lock:
            engine = self._on()
        if engine is None:
            raise RequestError("this saver has no engine, so there is no K/V to keep: give it one")
        ours = {path.digest: path for path in paths if path.model == engine.name}
        return sum(engine.cache_prefix(token_ids=path.token_ids) for path in ours.values())

    def touch(self, keys: Collection[TokenKey]) -> None:
        """Somebody goes on from these paths: they are the last to go."""
        with self._lock:
            for key in keys:
                if key in self._branches:
                    self._branches.move_to_end(key)

    def release(self, keys: Collection[TokenKey]) -> None:
        """Gives the K/V of these paths back."""
        with self._lock:
            for key in keys:
                branch = self._branches.pop(key, None)
                if branch is not None:
                    branch.prune()

    def _opened(self, snapshot: Snapshot) -> Branch | None:
        """A checkpoint is written whether or not its K/V can be held: an engine that is closed or full holds none."""
        engine = self._on()
        if engine is None or snapshot.model != engine.name or not self._most:
            return None
        try:
            branch = engine.root(token_ids=snapshot.token_ids, seed=0)  # a seed, so that other roots draw as without it
        except EngineError:
            return None
        branch.value = -math.inf  # what a program holds itself is worth more
        return branch

    def _on(self) -> Engine | None:
        if isinstance(self._source, str):
            if self._engine is not None and self._engine.engine.has_ended:
                self._branches.clear()  # they went with it
            if self._engine is None or self._engine.engine.has_ended:
                self._engine = ENGINES.lease(EngineSettings(self._source))
            return self._engine.engine
        return self._source
