"""What a run spends: counted here, and held against its budget."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from dendrite.dsl.functions import OutOfBudget
from dendrite.dsl.records import Budget

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run took. Figures of the engine include whatever else ran on it meanwhile."""

    tokens_generated: int
    """By steps and by `Node.ask`; what `Budget.tokens` limits."""
    tokens_computed: int
    """Rows that went through the model: prompts, cues, questions, labels and generated tokens, each once."""
    tokens_logical: int
    """Rows it would have been had every generation and score been a request of its own, with its whole prompt."""
    forks: int
    nodes: int
    """Nodes made, the root aside."""
    steps: int
    """Steps of the engine."""
    peak_kv_bytes: int
    """The most K/V that was held at the end of any operation, beyond what was held before."""
    seconds: float

    @property
    def occupancy(self) -> float:
        """Rows in a step on average: how full its batches were."""
        return self.tokens_computed / self.steps if self.steps else 0.0


class Spent(TypedDict):
    """What a run has used of its budget."""

    tokens: int
    seconds: float


class Meter:
    """One run's counters and what they may still take."""

    def __init__(self, engine: Engine, budget: Budget | None) -> None:
        self._engine = engine
        self._budget = budget or Budget()
        self._start = time.monotonic()
        self._before = engine.stats()
        self._peak_blocks = 0
        self._num_reserved = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._holds_too_much = False
        self.has_refused = False
        """Whether something was asked for that the budget did not allow."""
        self.num_tokens = 0
        self.num_nodes = 0

    def is_spent(self, *, is_idle: bool) -> bool:
        """Whether the budget allows no further expansion.

        Args:
            is_idle: nothing is under way. While something is, tokens and nodes are not looked at: how many were taken
                by now depends on timing, and whoever asks for more than there is is refused in turn.
        """
        limits = ((self.num_tokens, self._budget.tokens), (self.num_nodes, self._budget.nodes))
        if is_idle and any(limit is not None and count >= limit for count, limit in limits):
            return True
        seconds = self.seconds_left()
        return self.has_refused or self._holds_too_much or (seconds is not None and seconds <= 0)

    def reserve_tokens(self, wanted: int) -> int:
        """Take up to `wanted` tokens out of the budget for one generation.

        Returns:
            All of them, or what is left if nothing else is reserved, or 0: then others must settle first, unless the
            budget is spent.
        """
        limit = self._budget.tokens
        left = wanted if limit is None else max(0, limit - self.num_tokens - self._num_reserved)
        granted = wanted if left >= wanted else 0 if self._num_reserved else left
        self._num_reserved += granted
        return granted

    async def reserve_soon(self, wanted: int) -> int:
        """`reserve_tokens`, after waiting for others to settle.

        Raises:
            OutOfBudget: nothing is left.
        """
        while not (granted := self.reserve_tokens(wanted)) and wanted > 0:
            if not self._num_reserved:
                self.has_refused = True
                raise OutOfBudget("the budget of tokens ended")
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return granted

    def settle_tokens(self, granted: int, used: int) -> None:
        """Count what a generation used and put the rest back."""
        self._num_reserved -= granted
        self.num_tokens += used
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def take_nodes(self, wanted: int, *, count_live: Callable[[], int]) -> int:
        """Count up to `wanted` new nodes; how many the budget allows beside those whose branches are live."""
        granted, budget = wanted, self._budget
        if budget.nodes is not None:
            granted = min(granted, budget.nodes - self.num_nodes)
        if budget.branches is not None:
            granted = min(granted, budget.branches - count_live())
        granted = max(0, granted)
        self.has_refused |= granted < wanted
        self.num_nodes += granted
        return granted

    def seconds_left(self) -> float | None:
        """Seconds until the budget ends; None without a limit."""
        limit = self._budget.seconds
        return None if limit is None else self._start + limit - time.monotonic()

    def look(self) -> None:
        """Note how much K/V is held now."""
        held = self._engine.blocks_used - self._before.blocks_used
        self._peak_blocks = max(self._peak_blocks, held)
        limit = self._budget.kv_bytes
        self._holds_too_much = limit is not None and held * self._before.block_bytes > limit

    @property
    def spent(self) -> Spent:
        """What counts against the budget, to go on from."""
        return {"tokens": self.num_tokens, "seconds": time.monotonic() - self._start}

    def restore(self, spent: Spent, *, num_nodes: int) -> None:
        """Go on from what an earlier process spent."""
        self.num_tokens = int(spent["tokens"])
        self._start -= spent["seconds"]
        self.num_nodes = num_nodes

    def lift(self) -> None:
        """The run is over: what users ask its nodes from now on is their own."""
        self._budget = Budget()
        self._holds_too_much = self.has_refused = False

    def usage(self) -> Usage:
        """What was spent until now."""
        now, before = self._engine.stats(), self._before
        return Usage(
            tokens_generated=self.num_tokens,
            tokens_computed=now.tokens_computed - before.tokens_computed,
            tokens_logical=now.tokens_logical - before.tokens_logical,
            forks=now.forks - before.forks,
            nodes=self.num_nodes,
            steps=now.steps - before.steps,
            peak_kv_bytes=self._peak_blocks * now.block_bytes,
            seconds=time.monotonic() - self._start,
        )
