"""Which tokens the next step computes: admission by worst case, decoding branches first, prefill in chunks.

Where not all can run, calls of higher priority go first, and equal ones in the order they came.

    submitted groups ──► queue ──► running ──► one `Step`: runs of tokens (rows), and who reads which hidden row

Admission is the only truth about memory: a request enters when the blocks it may take at worst, together with those of
all that runs, are available, or will be once idle branches have left the pool. So whatever runs can finish, the first
in the queue is next as soon as enough has finished, and what would not fit into an empty pool is refused at once.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from dendrite.engine.batch import Batch
from dendrite.engine.demand import demand, footprint, prunable
from dendrite.engine.errors import EngineError, OutOfBlocks, StepFailed
from dendrite.engine.ids import TRASH_BLOCK, BlockId, NodeId
from dendrite.engine.nodes import HiddenRow, KVNode, Tip
from dendrite.engine.plan import Run, plan_runs
from dendrite.engine.pressure import Pressure
from dendrite.engine.requests import Demand, GenerateRequest, Group, Request, ScoreRequest
from dendrite.engine.states import next_status
from dendrite.engine.swap import SwapSpace
from dendrite.engine.tree import KVTree

MAX_DECODE_ROWS = 256
"""Rows of branches that decode in one step, one each unless a constraint forced tokens; more branches take turns."""
MAX_FORCED_ROWS = 64
"""A branch with more forced tokens than this is computed as a prompt is, in what is left of the step."""
DECODE_SHARE = 4
"""While branches decode, prefill gets this fraction of a chunk a step, so that they are not stalled."""


@dataclass(frozen=True, slots=True)
class Read:
    """One hidden row that a request waits for; it predicts candidate token `index` of `candidate` when scoring."""

    request: Request
    source: int | HiddenRow
    """A position in the step's outputs, or a row kept from an earlier step: (hidden rows, index)."""
    candidate: int = 0
    index: int = 0


@dataclass(slots=True)
class Step:
    """One heartbeat's work. `batch` is None when everything is read from kept rows."""

    batch: Batch | None
    runs: list[tuple[Run, int, int | None]]
    """(run, the node's epoch, position of its last row in the outputs if it is one of them)"""
    reads: list[Read]
    failed: list[tuple[Request, EngineError]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Tokens that go through the model in this step."""
        return self.batch.plan.num_rows if self.batch is not None else 0


class Scheduler:
    """Owns the queue and what runs; reads and places, but never computes. The engine's lock guards it."""

    def __init__(self, tree: KVTree, swap: SwapSpace, *, prefill_chunk: int) -> None:
        self._tree = tree
        self._pressure = Pressure(tree, swap)
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
        builder = _StepBuilder(self._tree, self._pressure, self._busy_with(()))
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
        step.failed = [(request, error) for request, error in step.failed if id(request) not in back]
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


class _StepBuilder:
    """Collects runs that can share one forward pass.

    Two rules keep `plan_runs` simple and copies right. A node has one kept run, which ends where everybody who needs
    it in this step needs it. A node whose block must be copied waits a step if its parent's run is in this one, since
    copies are made before the pass.
    """

    def __init__(self, tree: KVTree, pressure: Pressure, busy: Sequence[Tip] = ()) -> None:
        self._tree = tree
        self._pressure = pressure
        self._busy = busy  # what may not leave the pool to make room
        self._runs: dict[NodeId, Run] = {}
        self._queries: dict[tuple[NodeId, int], Run] = {}
        self._copies: list[tuple[BlockId, BlockId]] = []
        self._all_rows: set[NodeId] = set()
        self._last_row: set[int] = set()  # id() of runs whose last row is an output
        self._waiting: list[tuple[Request, Run | HiddenRow, int, int, int]] = []
        self._failed: list[tuple[Request, EngineError]] = []
        self._num_rows = 0

    def add_request(self, request: Request, *, budget: int) -> int:
        """Adds what fits of the request; returns how many rows that took."""
        rows = self._num_rows
        try:
            while not self._has_added(request, budget):
                pass
        except OutOfBlocks as error:
            self._failed.append((request, error))
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - others are in this step as well, and copies that must be made
            failure = StepFailed(f"no room could be made for the request: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._failed.append((request, failure))
        return self._num_rows - rows

    def _has_added(self, request: Request, budget: int) -> bool:
        """Adds what fits; False if it should be tried again, since idle branches have made room for it.

        Raises:
            OutOfBlocks: no room can be made.
        """
        try:
            if isinstance(request, ScoreRequest):
                self._add_score(request, budget)
            else:
                self._add_last(request, budget)
        except OutOfBlocks as error:
            if not (self._busy and self._pressure.make_room(error.needed, self._busy)):
                raise
            return False
        return True

    def build(self) -> Step:
        """The step made of what was added."""
        runs = [*self._runs.values(), *self._queries.values()]
        if not runs:
            return Step(None, [], list(self._reads({})), self._failed)
        ordered, plan = plan_runs(self._tree, runs)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        output_rows: list[int] = []
        first_output: dict[int, int] = {}
        for run in ordered:
            row = len(token_ids)
            first_output[id(run)] = len(output_rows)
            output_rows.extend(self._outputs_of(run, row))
            token_ids.extend(run.node.token_ids[run.start : run.end])
            positions.extend(range(run.node.start + run.start, run.node.start + run.end))
            slots.extend(self._tree.slots(run.node, run.start, run.end) if run.is_kept else [TRASH_BLOCK])
        batch = Batch(token_ids, positions, slots, plan, self._copies, output_rows)
        steps = [(run, run.node.epoch, self._last_output(run, first_output)) for run in ordered]
        return Step(batch, steps, list(self._reads(first_output)), self._failed)

    def _add_last(self, request: Request, budget: int) -> bool:
        """Wants the hidden row at the tip; returns whether this step yields it."""
        source = self._row_at(request.tip, budget)
        if source is None:
            return False
        if isinstance(request, ScoreRequest):
            request.has_base = True
            for candidate in range(len(request.candidates)):
                self._waiting.append((request, source, 0, candidate, 0))
        else:
            self._waiting.append((request, source, 0, 0, 0))
        return True

    def _add_score(self, request: ScoreRequest, budget: int) -> None:
        before = self._num_rows
        if not request.has_base and not self._add_last(request, budget):
            return
        for candidate, tip in request.siblings:
            left = budget - (self._num_rows - before)
            run = self._extend_run(tip.node, tip.offset, left) if tip.node.num_computed < tip.offset else None
            if run is not None:
                self._all_rows.add(tip.node.node_id)
                first = run.node.start + run.start + 1 - request.tip.length  # the sibling may have taken over a node
                for row in range(run.num_rows):
                    self._waiting.append((request, run, row, candidate, first + row))

    def _row_at(self, tip: Tip, budget: int) -> Run | HiddenRow | None:
        """Where the hidden row after the tip's last token comes from; None if not from this step."""
        run: Run | None = None
        for node, upto in self._tree.pending(tip):
            if node.stored is not None and not self._move_in(node):
                return None
            if node.num_computed >= upto:
                continue
            run = self._extend_run(node, upto, budget)
            if run is None or run.end != upto:
                return None
            budget -= run.num_rows
        node, offset = tip.node, tip.offset
        if run is None:
            kept = node.hidden.get(offset)
            return kept if kept is not None else self._query(node, offset)
        if node.node_id not in self._runs:  # it was moved in behind a run
            return None
        self._last_row.add(id(run))
        return run

    def _move_in(self, node: KVNode) -> bool:
        """Puts stored K/V back into the pool, unless it has to wait for a step that computes what lies before it."""
        if node.parent is not None and node.parent.node_id in self._runs and self._tree.needs_copy(node):
            return False
        self._pressure.move_in(node)
        return True

    def _query(self, node: KVNode, offset: int) -> Run:
        """The row that computes the token before `offset` again, for its hidden row alone."""
        query = self._queries.get((node.node_id, offset))
        if query is None:
            query = self._queries[node.node_id, offset] = Run(node, offset - 1, offset, is_kept=False)
            self._last_row.add(id(query))
            self._num_rows += 1
        return query

    def _extend_run(self, node: KVNode, upto: int, budget: int) -> Run | None:
        """The node's run up to `upto`, or as far as the budget goes; None if it can't be in this step."""
        known = self._runs.get(node.node_id)
        if known is not None:
            return known if known.end == upto else None
        parent_runs = node.parent is not None and node.parent.node_id in self._runs
        if budget <= 0 or (parent_runs and self._tree.needs_copy(node)):
            return None
        run = Run(node, node.num_computed, min(upto, node.num_computed + budget))
        self._copies += self._tree.place(node, run.end)
        self._runs[node.node_id] = run
        self._num_rows += run.num_rows
        return run

    def _outputs_of(self, run: Run, row: int) -> Sequence[int]:
        if run.is_kept and run.node.node_id in self._all_rows:
            return range(row, row + run.num_rows)
        return [row + run.num_rows - 1] if id(run) in self._last_row else []

    def _last_output(self, run: Run, first_output: dict[int, int]) -> int | None:
        if run.is_kept and run.node.node_id in self._all_rows:
            return first_output[id(run)] + run.num_rows - 1
        return first_output[id(run)] if id(run) in self._last_row else None

    def _reads(self, first_output: dict[int, int]) -> Iterator[Read]:
        for request, source, row, candidate, index in self._waiting:
            place = first_output[id(source)] + row if isinstance(source, Run) else source
            yield Read(request, place, candidate, index)
