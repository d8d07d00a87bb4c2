"""Who runs, and who of them is in the next step: admission by worst case, decoding first, prefill in chunks.

Where not all can run, calls of higher priority go first, and equal ones in the order they came.

    submitted groups ──► queue ──► running ──► `StepBuilder` ──► one `Step`
                           ▲          │
                           └──────────┘ no block for its next token: preempted

Admission is the only truth about memory: a request enters when the blocks it may take at worst, together with those of
all that runs, are available, or will be once idle branches have left the pool. So whatever runs can finish, the first
in the queue is next as soon as enough has finished, and what would not fit into an empty pool is refused at once.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from dendrite.engine.demand import demand, footprint, prunable
from dendrite.engine.errors import EngineError, OutOfBlocks
from dendrite.engine.nodes import Tip
from dendrite.engine.plan import Planner
from dendrite.engine.pressure import Pressure
from dendrite.engine.requests import Demand, GenerateRequest, Group, Request, ScoreRequest
from dendrite.engine.states import next_status
from dendrite.engine.step import Step, StepBuilder
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree

MAX_DECODE_ROWS = 256
"""Rows of branches that decode in one step, one each unless a constraint forced tokens; more branches take turns."""
MAX_FORCED_ROWS = 64
"""A branch with more forced tokens than this is computed as a prompt is, in what is left of the step."""
DECODE_SHARE = 4
"""While branches decode, prefill gets this fraction of a chunk a step, so that they are not stalled."""


class Scheduler:
    """Owns the queue and what runs; reads and places, but never computes. The engine's lock guards it."""

    def __init__(self, tree: KVTree, swap: SwapSpace, *, prefill_chunk: int) -> None:
        self._tree = tree
        self._pressure = Pressure(tree, swap)
        self._planner = Planner(tree)
        self._num_steps = 0
        self._prefill_chunk = prefill_chunk
        self._queue: deque[Group] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self.running or self._queue)

    def submit(self, group: Group) -> None:
        """Queues the group.

        Raises:
            OutOfBlocks: one of its requests could not even run alone; nothing was changed.
        """
        for request in group.requests:
            self.check_fits(request.demand())
        for request in group.requests:
            if isinstance(request, GenerateRequest):
                request.tip.status = next_status(request.tip.status, "submit")
        place = len(self._queue)
        while place and self._queue[place - 1].priority < group.priority:
            place -= 1
        self._queue.insert(place, group)

    @property
    def num_spare(self) -> int:
        """Available blocks that nothing running may still take."""
        return max(0, self._tree.pool.num_available - demand(self._tree.pool, _demand_of(self.running)))

    def check_fits(self, wanted: Demand) -> None:
        """Whether this could run if nothing else did.

        Raises:
            OutOfBlocks: it could not.
        """
        if demand(self._tree.pool, wanted) <= self._tree.pool.num_free:
            return  # it fits beside all that is there, which is quicker to tell on a long path
        needed = footprint(self._tree.pool, wanted)
        if needed > self._tree.pool.num_total:
            raise self._refusal(needed, [tip for tip, _, _ in wanted])

    def open_groups(self) -> list[Group]:
        """Everything queued or running, once each."""
        running = [request.group for request in self.running if request.group is not None]
        return list({id(group): group for group in (*running, *self._queue)}.values())

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is: it ended, failed or was cancelled."""
        if request.is_done:
            return
        request.is_done = True
        group = request.group
        assert group is not None
        group.num_open -= 1
        if isinstance(request, ScoreRequest):
            request.close(self._tree)
        elif request.tip.status != "pruned":
            request.tip.status = next_status(request.tip.status, "finish")
        if request.is_running:
            self.running.remove(request)
        else:
            group.queued.remove(request)
            if not group.queued:
                self._queue.remove(group)
        request.group = None  # no cycle: a branch that is dropped with its generation is freed at once

    def schedule(self) -> Step:
        """The next step, with all its slots placed.

        A request that finds no block for a token (another branch took the shared tail it had counted on) goes back to
        the queue, or is in `failed` if nothing else runs; the step is still good for the others.
        """
        self._num_steps += 1
        failed = self._admit()
        step = self._next_step()
        while self._preempt(step) and not (step.batch or step.reads):
            step = self._next_step()
        step.failed += failed
        is_idle = all(request.is_waiting for request in self.running)
        assert step.batch or step.reads or step.failed or is_idle, "nothing can be done for what runs"
        return step

    def _next_step(self) -> Step:
        builder = StepBuilder(self._tree, self._pressure, self._planner, self._busy_with(()))
        ready = [request for request in self.running if not request.is_waiting]
        decoding = [request for request in ready if isinstance(request, GenerateRequest) and _decodes(request)]
        ends = accumulate(request.num_pending for request in decoding)
        served = [request for request, end in zip(decoding, ends, strict=True) if end <= MAX_DECODE_ROWS]
        for generation in served:
            builder.add_request(generation, budget=generation.num_pending)
        if len(served) < len(decoding):  # take turns
            late = set(map(id, served))
            self.running.sort(key=lambda request: (-request.priority, id(request) in late))
        budget = max(1, self._prefill_chunk // DECODE_SHARE) if decoding else self._prefill_chunk
        for request in ready:
            if budget <= 0:
                break
            if not (isinstance(request, GenerateRequest) and _decodes(request)):
                budget -= builder.add_request(request, budget=budget)
        return builder.build()

    def _preempt(self, step: Step) -> bool:
        """Sends generations that found no block back to the queue while others run; whether there was one.

        They are those that were served last, the least important. What is left alone has the pool to itself, since the
        K/V of those that wait may leave it; so somebody always goes on.
        """
        starved = [
            request
            for request, error in step.failed
            if isinstance(error, OutOfBlocks) and isinstance(request, GenerateRequest) and request.is_running
        ]
        sent_back = starved[::-1][: len(self.running) - 1]
        for request in sent_back:
            group = request.group
            assert group is not None
            self.running.remove(request)
            request.is_running = False
            request.tip.status = next_status(request.tip.status, "preempt")
            group.queued.insert(0, request)
            if group not in self._queue:
                self._queue.appendleft(group)
        back = set(map(id, sent_back))
        step.failed[:] = [(request, error) for request, error in step.failed if id(request) not in back]
        return bool(sent_back)

    def commit(self, step: Step, hidden: object) -> None:
        """Marks what the step computed, unless it was rolled back meanwhile, and keeps each run's last hidden row.

        On a device that runs launches in order, a step counts as computed once it is launched.
        """
        for run, epoch, output in step.runs:
            node = run.node
            if node.epoch != epoch:
                continue
            node.last_used = self._num_steps
            if run.is_kept:
                node.num_computed = run.end
            if output is not None and (run.is_kept or not node.hidden):
                node.keep_hidden(run.end, (hidden, output))

    def _admit(self) -> list[tuple[Request, EngineError]]:
        """Starts what fits, in the order of the queue; what does not even fit alone has failed."""
        while self._queue:
            group = self._queue[0]
            num = self._num_admissible(group.queued)
            chosen = group.queued[: max(num, 1)]
            if not num and self.running:
                return []
            tips = self._busy_with(chosen)
            while not self._pressure.make_room(self._demand_with(chosen), tips):
                if self.running or len(chosen) > 1:
                    return []
                return [(request, self._refusal(self._demand_with(chosen), tips)) for request in group.queued]
            for request in chosen:
                self._start(request)
            del group.queued[: len(chosen)]
            if group.queued:
                return []
            self._queue.popleft()
        return []

    def _num_admissible(self, queued: Sequence[Request]) -> int:
        """How many of the first queued requests can run beside what runs."""
        if self._fits(queued):
            return len(queued)
        least, most = 0, len(queued)  # so many fit, so many don't
        while most - least > 1:
            middle = (least + most) // 2
            if self._fits(queued[:middle]):
                least = middle
            else:
                most = middle
        return least

    def _fits(self, chosen: Sequence[Request]) -> bool:
        pool = self._tree.pool
        needed = self._demand_with(chosen)
        if needed <= pool.num_available:
            return True
        return needed <= pool.num_available + self._pressure.num_movable(self._busy_with(chosen))

    def _busy_with(self, chosen: Sequence[Request]) -> list[Tip]:
        return [tip for request in (*self.running, *chosen) for tip in request.tips]

    def _demand_with(self, chosen: Sequence[Request]) -> int:
        return demand(self._tree.pool, _demand_of((*self.running, *chosen)))

    def _start(self, request: Request) -> None:
        request.is_running = True
        insort(self.running, request, key=lambda other: -other.priority)  # after those of equal priority
        if isinstance(request, ScoreRequest):
            request.open_siblings(self._tree)
        else:
            request.tip.status = next_status(request.tip.status, "admit")

    def _refusal(self, needed: int, tips: Sequence[Tip]) -> OutOfBlocks:
        pool = self._tree.pool
        return OutOfBlocks(needed, pool.num_available, prunable(pool, tips))


def _demand_of(requests: Sequence[Request]) -> Demand:
    return [entry for request in requests for entry in request.demand()]


def _decodes(request: GenerateRequest) -> bool:
    """Whether only the last token, and what a constraint forced after it, lack their K/V."""
    node = request.tip.node
    parent_is_done = node.parent is None or node.parent.num_computed >= node.offset
    num_missing = request.tip.offset - node.num_computed
    return parent_is_done and num_missing <= request.num_pending <= MAX_FORCED_ROWS
