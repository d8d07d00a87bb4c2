"""A checkpointer for graphs whose state carries branches: it also copies threads, prunes them and deletes runs.

A checkpoint is a lease on the K/V of the branches that it names: it stays while the checkpoint does and memory allows,
and only nodes that run pin any. Going back to an old checkpoint goes on from that K/V; what memory did not allow, or a
new process lacks, is computed again from the tokens, which are in a table beside the checkpoints.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)

from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError
from dendrite.integrations.langgraph.leases import Leases
from dendrite.integrations.langgraph.rows import storage_of
from dendrite.integrations.langgraph.stored_handles import StoredHandles
from dendrite.integrations.langgraph.token_table import Place, TokenTable

STRATEGIES = ("keep_latest", "delete")


class TimeTravelSaver(BaseCheckpointSaver[str]):
    """Wraps an `InMemorySaver`, a `SqliteSaver` or an `AsyncSqliteSaver`.

        graph = builder.compile(checkpointer=TimeTravelSaver(InMemorySaver(), engine))

    Over the first two it serves sync and async graphs, over the third async ones.
    """

    def __init__(
        self, inner: BaseCheckpointSaver[str], engine: Engine | str | None = None, *, most_leases: int = 1024
    ) -> None:
        """Wrap a saver.

        Args:
            inner: keeps the checkpoints.
            engine: an Engine, or the name of one, on which checkpoints hold the K/V of their branches; without it they
                hold tokens alone, and going back is as quick as the engine's cache of prefixes allows.
            most_leases: branches held at a time; those used longest ago are let go.

        Raises:
            RequestError: a saver of another kind, or a wrong number.
        """
        super().__init__(serde=inner.serde)
        self._inner = inner
        self._rows, database = storage_of(inner)
        self._leases = Leases(engine, most_leases)
        self._handles = StoredHandles(TokenTable(database), self._leases)

    @property
    def num_leases(self) -> int:
        """Branches that checkpoints hold now; `engine.stats()` counts them among its branches and blocks."""
        return len(self._leases)

    # --- what every saver does ---------------------------------------------------------------------------------

    @property
    def config_specs(self) -> builtins.list[Any]:
        """The wrapped saver's."""
        return self._inner.config_specs

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """See `BaseCheckpointSaver.get_tuple`."""
        saved = self._inner.get_tuple(config)
        return None if saved is None else self._whole(saved)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """See `BaseCheckpointSaver.list`."""
        found = builtins.list(self._inner.list(config, filter=filter, before=before, limit=limit))
        return map(self._whole, found)  # not while listing, during which a SqliteSaver's lock is held

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """See `BaseCheckpointSaver.put`."""
        where = config["configurable"]
        place = Place(where["thread_id"], where.get("checkpoint_ns", ""), checkpoint["id"])
        short = checkpoint.copy()
        short["channel_values"] = self._handles.shortened(place, checkpoint["channel_values"])
        return self._inner.put(config, short, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """See `BaseCheckpointSaver.put_writes`."""
        self._inner.put_writes(config, self._handles.shortened(_place(config), list(writes)), task_id, task_path)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """See `BaseCheckpointSaver.get_delta_channel_history`."""
        history: Mapping[str, DeltaChannelHistory] = self._handles.whole(
            {**self._inner.get_delta_channel_history(config=config, channels=channels)}
        )
        return history

    def get_next_version(self, current: str | None, channel: None) -> str:
        """The wrapped saver's."""
        return self._inner.get_next_version(current, channel)

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> TimeTravelSaver:
        """A saver that reads further types back, over the same checkpoints."""
        clone = copy.copy(self)
        clone._inner = self._inner.with_allowlist(extra_allowlist)
        clone.serde = clone._inner.serde
        return clone

    def delete_thread(self, thread_id: str) -> None:
        """Remove all checkpoints of a thread, with the tokens and the K/V that no other thread has."""
        self._inner.delete_thread(thread_id)
        self._handles.release_thread(thread_id)

    # --- what LangGraph's savers leave out ---------------------------------------------------------------------

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Remove the checkpoints that these runs made, in all threads."""
        found = [saved for run_id in run_ids for saved in self._inner.list(None, filter={"run_id": run_id})]
        self._remove({_place(saved.config) for saved in found})

    def keep_kv(self, config: RunnableConfig) -> int:
        """Write down the K/V of the branches that a checkpoint names, in the engine's `prefix_cache` folder.

        A process that starts later goes on from there without computing their tokens again.

        Args:
            config: a thread, for its latest checkpoint, or one of its checkpoints.

        Returns:
            The tokens that had to be computed: 0 as long as the engine has their K/V.

        Raises:
            RequestError: the saver has no engine, or the engine was loaded without `prefix_cache`.
            SnapshotError: the folder cannot be written to.
        """
        saved = self.get_tuple(config)
        values = [saved.checkpoint["channel_values"], saved.pending_writes] if saved is not None else []
        return self._handles.keep_kv(values)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Give a thread's whole history to a new thread: both go on from the same branches, each its own way.

        Raises:
            RequestError: the target has checkpoints already. Nothing was changed.
        """
        if next(self._inner.list(_thread(target_thread_id), limit=1), None) is not None:
            raise RequestError(f"thread {target_thread_id!r} has checkpoints: copy to a new one, or delete it first")
        self._handles.copy_thread(source_thread_id, target_thread_id)
        for saved in reversed(builtins.list(self._inner.list(_thread(source_thread_id)))):
            self._copy(saved, target_thread_id)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Shorten threads to their latest checkpoint in each namespace, or remove them with strategy "delete".

        Older checkpoints that a delta channel of the latest one is put together from stay.

        Raises:
            RequestError: an unknown strategy. Nothing was changed.
        """
        if strategy not in STRATEGIES:
            raise RequestError(f"strategy={strategy!r} cannot be used: give one of {', '.join(STRATEGIES)}")
        for thread_id in thread_ids:
            if strategy == "delete":
                self.delete_thread(thread_id)
            else:
                self._keep_latest(thread_id)

    def _copy(self, saved: CheckpointTuple, thread_id: str) -> None:
        place = _place(saved.config)
        parent = _place(saved.parent_config).checkpoint_id if saved.parent_config is not None else None
        where: dict[str, Any] = {"thread_id": thread_id, "checkpoint_ns": place.namespace}
        under = {"configurable": {**where, **({"checkpoint_id": parent} if parent is not None else {})}}
        versions = saved.checkpoint["channel_versions"]
        self._inner.put(_config(under), saved.checkpoint, saved.metadata, versions)
        at = _config({"configurable": {**where, "checkpoint_id": place.checkpoint_id}})
        writes: dict[str, builtins.list[tuple[str, Any]]] = {}
        for task_id, channel, value in saved.pending_writes or ():
            writes.setdefault(task_id, []).append((channel, value))
        for index, (task_id, written) in enumerate(writes.items()):
            self._inner.put_writes(at, written, task_id, f"{index:06}")  # a path, so that they stay in this order

    def _keep_latest(self, thread_id: str) -> None:
        saved = {_place(one.config): one for one in self._inner.list(_thread(thread_id))}
        latest: dict[str, Place] = {}
        for place in saved:
            latest[place.namespace] = max(latest.get(place.namespace, place), place)
        kept = {place for newest in latest.values() for place in _needed(newest, saved)}
        self._remove(saved.keys() - kept)

    def _remove(self, places: Collection[Place]) -> None:
        self._rows.remove(places)
        self._handles.release(places)

    def _whole(self, saved: CheckpointTuple) -> CheckpointTuple:
        checkpoint = saved.checkpoint.copy()
        values, writes = self._handles.whole((saved.checkpoint["channel_values"], saved.pending_writes))
        checkpoint["channel_values"] = values
        return saved._replace(checkpoint=checkpoint, pending_writes=writes)

    # --- the same for asyncio ----------------------------------------------------------------------------------

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """`get_tuple` in a thread, as all that follow."""
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """`list` for asyncio."""
        for saved in await asyncio.to_thread(lambda: [*self.list(config, filter=filter, before=before, limit=limit)]):
            yield saved

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """`put` for asyncio."""
        return await asyncio.to_thread(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """`put_writes` for asyncio."""
        await asyncio.to_thread(self.put_writes, config, writes, task_id, task_path)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """`get_delta_channel_history` for asyncio."""
        return await asyncio.to_thread(lambda: self.get_delta_channel_history(config=config, channels=channels))

    async def adelete_thread(self, thread_id: str) -> None:
        """`delete_thread` for asyncio."""
        await asyncio.to_thread(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """`delete_for_runs` for asyncio."""
        await asyncio.to_thread(self.delete_for_runs, run_ids)

    async def akeep_kv(self, config: RunnableConfig) -> int:
        """`keep_kv` for asyncio."""
        return await asyncio.to_thread(self.keep_kv, config)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """`copy_thread` for asyncio."""
        await asyncio.to_thread(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """`prune` for asyncio."""
        await asyncio.to_thread(lambda: self.prune(thread_ids, strategy=strategy))


def _config(config: dict[str, Any]) -> RunnableConfig:
    return RunnableConfig(configurable=config["configurable"])


def _thread(thread_id: str) -> RunnableConfig:
    return RunnableConfig(configurable={"thread_id": thread_id})


def _place(config: RunnableConfig) -> Place:
    where = config["configurable"]
    return Place(where["thread_id"], where.get("checkpoint_ns", ""), where["checkpoint_id"])


def _needed(latest: Place, saved: Mapping[Place, CheckpointTuple]) -> Iterator[Place]:
    """The latest checkpoint, and its ancestors back to where each of its delta channels was written down whole."""
    at = saved[latest]
    yield latest
    deltas = set(at.metadata.get("counters_since_delta_snapshot") or ()) & at.checkpoint["channel_versions"].keys()
    open_channels = deltas - at.checkpoint["channel_values"].keys()  # without a version nothing was ever written to it
    while open_channels and at.parent_config is not None:
        parent = saved.get(_place(at.parent_config))
        if parent is None:
            return
        yield _place(parent.config)
        open_channels -= parent.checkpoint["channel_values"].keys()
        at = parent
