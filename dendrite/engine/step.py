"""One step, from the requests in it to the runner's lists, and which of its rows is read for whom.

    system [512 computed] ──┬── a [x y z]      a decodes: z lacks its K/V        run [z)            1 row, read
                            ├── b [. . . .]    b is a prompt in a chunk of 3     run [. . .)        3 rows, none read
                            └── c []           c was forked: nothing is lacking  system's kept row  0 rows, read

Slots are taken here. Where a branch goes on in a block that is not its own, the batch copies that block first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dendrite.engine.batch import Batch
from dendrite.engine.errors import EngineError, OutOfBlocks, StepFailed
from dendrite.engine.ids import TRASH_BLOCK, BlockId, NodeId
from dendrite.engine.nodes import HiddenRow, KVNode, Tip
from dendrite.engine.plan import Planner, Run
from dendrite.engine.pressure import Pressure
from dendrite.engine.requests import Request, ScoreRequest
from dendrite.engine.tree import KVTree


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


class StepBuilder:
    """Collects runs that can share one forward pass.

    Two rules keep plans simple and copies right. A node has one kept run, which ends where everybody who needs
    it in this step needs it. A node whose block must be copied waits a step if its parent's run in this one computes
    some of what is copied, since copies are made before the pass.
    """

    def __init__(self, tree: KVTree, pressure: Pressure, planner: Planner, busy: Sequence[Tip] = ()) -> None:
        self._tree = tree
        self._planner = planner
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
            self._failed.append((request, _failure_of(error)))
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
        ordered, plan = self._planner.plan(runs)
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        output_rows: list[int] = []
        first_output: dict[int, int] = {}
        steps: list[tuple[Run, int, int | None]] = []
        for run in ordered:
            node, num_rows = run.node, run.num_rows
            first = first_output[id(run)] = len(output_rows)
            if run.is_kept and node.node_id in self._all_rows:
                output_rows.extend(range(len(token_ids), len(token_ids) + num_rows))
            elif id(run) in self._last_row:
                output_rows.append(len(token_ids) + num_rows - 1)
            last = len(output_rows) - 1
            steps.append((run, node.epoch, last if last >= first else None))
            token_ids.extend(node.token_ids[run.start : run.end])
            positions.extend(range(node.start + run.start, node.start + run.end))
            slots.extend(self._tree.slots(node, run.start, run.end) if run.is_kept else [TRASH_BLOCK])
        batch = Batch(token_ids, positions, slots, plan, self._copies, output_rows)
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
            self._last_row.add(id(run))  # an ancestor's too: others may go on from there without computing it again
        node, offset = tip.node, tip.offset
        if run is None:
            kept = node.hidden.get(offset)
            return kept if kept is not None else self._query(node, offset)
        if node.node_id not in self._runs:  # it was moved in behind a run
            return None
        return run

    def _move_in(self, node: KVNode) -> bool:
        """Puts stored K/V back into the pool, unless it has to wait for a step that computes what lies before it."""
        if self._copies_from_this_step(node):
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
        if budget <= 0 or self._copies_from_this_step(node):
            return None
        run = Run(node, node.num_computed, min(upto, node.num_computed + budget))
        self._copies += self._tree.place(node, run.end)
        self._runs[node.node_id] = run
        self._num_rows += run.num_rows
        return run

    def _copies_from_this_step(self, node: KVNode) -> bool:
        """Whether the node's block is a copy of one that this step computes some of, or copies itself.

        A parent that only goes on behind where the node begins does not keep it waiting: it may do so for long.
        """
        parent = node.parent
        if parent is None or parent.node_id not in self._runs:
            return False
        source = self._tree.copy_source(node)
        if source is None:
            return False
        return parent.num_computed < node.offset or any(source == made for _, made in self._copies)

    def _reads(self, first_output: dict[int, int]) -> Iterator[Read]:
        for request, source, row, candidate, index in self._waiting:
            place = first_output[id(source)] + row if isinstance(source, Run) else source
            yield Read(request, place, candidate, index)


def _failure_of(error: Exception) -> StepFailed:
    failure = StepFailed(f"no room could be made for the request: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
