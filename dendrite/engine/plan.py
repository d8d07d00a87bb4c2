"""From runs of tokens to one step's index lists: rows in depth-first order, segments cut where paths part.

Below a node, entries are ordered by the offset they are attached at, so the rows that read any stretch of the node's
keys are one range:

    node   k k k k k k k k k | q        rows below it, by offset:   a (at 3)   b (at 6)   its own run (at 9)
           0     3     6     9
    segment [0, 3)  ← rows of a, b, run
    segment [3, 6)  ← rows of    b, run
    segment [6, 9)  ← rows of       run          then the run's own keys, causally

Most steps of a search decode the branches of the step before, so that `Planner` lengthens its plan by a key a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dendrite.engine.batch import Plan, Segment
from dendrite.engine.ids import NodeId
from dendrite.engine.nodes import KVNode
from dendrite.engine.tree import KVTree


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens `[start, end)` of one node, computed in one step.

    A run with `is_kept` unset recomputes one token that has its K/V already, for its hidden row: it is a query only.
    """

    node: KVNode
    start: int
    end: int
    is_kept: bool = True

    @property
    def num_rows(self) -> int:
        """Tokens to compute."""
        return self.end - self.start


@dataclass(slots=True)
class _Open:
    """A segment under construction."""

    spans: list[tuple[int, int]]
    num_keys: int
    row_start: int
    row_end: int
    causal_rows: int = 0


class _Visit:
    """A node on some run's path: what hangs below it in this step."""

    __slots__ = ("above", "entries", "node", "num_rows", "row_start")

    def __init__(self, node: KVNode) -> None:
        self.node = node
        self.entries: list[tuple[float, int, _Visit | Run]] = []  # (place, the run's number, what is there)
        self.above: _Open | None = None  # the parent's segment that exactly this node's rows read
        self.num_rows = 0
        self.row_start = 0


class Planner:
    """Makes the plans of one step after the other."""

    def __init__(self, tree: KVTree) -> None:
        self._tree = tree
        self._last: _Last | None = None  # None where it cannot be lengthened

    def plan(self, runs: Sequence[Run]) -> tuple[list[Run], Plan]:
        """What `plan_runs` gives.

        Whoever computed a token in the last step and goes on in this one copies no block: it has one of its own.
        """
        if self._last is not None and self._last.goes_on_in(runs):
            self._last.lengthen(self._tree, runs)
            return [runs[index] for index in self._last.order], self._last.plan
        ordered, plan = plan_runs(self._tree, runs)
        self._last = _lengthenable(self._tree, runs, ordered, plan)
        return ordered, plan


@dataclass(slots=True)
class _Last:
    """A step in which every row is the newest token of a path of its own."""

    runs: Sequence[Run]
    epochs: list[int]
    """Of the runs' nodes."""
    order: list[int]
    """Places of the runs, in the order of their rows."""
    plan: Plan
    own: list[int]
    """Of each row the segment that only it reads and that ends with its own key."""

    def goes_on_in(self, runs: Sequence[Run]) -> bool:
        """Whether `runs` are the next tokens of the same paths, and nothing else."""
        return len(runs) == len(self.runs) and all(
            run.node is last.node and run.start == last.end == run.end - 1 and run.is_kept and run.node.epoch == epoch
            for run, last, epoch in zip(runs, self.runs, self.epochs, strict=True)
        )

    def lengthen(self, tree: KVTree, runs: Sequence[Run]) -> None:
        """Make it the next step."""
        segments = list(self.plan.segments)
        for row, (place, index) in enumerate(zip(self.order, self.own, strict=True)):
            spans, num_keys = segments[index].spans, segments[index].num_keys
            slot = _slot_of(tree, runs[place])
            first, last = spans[-1]
            more = ((first, slot + 1),) if slot == last else ((first, last), (slot, slot + 1))
            segments[index] = Segment(spans[:-1] + more, num_keys + 1, row, row + 1)
        self.runs, self.plan = runs, Plan(self.plan.num_rows, tuple(segments))


def _lengthenable(tree: KVTree, runs: Sequence[Run], ordered: list[Run], plan: Plan) -> _Last | None:
    if plan.num_rows != len(runs) or not all(run.is_kept for run in runs):
        return None
    ends = {
        segment.row_start: (index, segment.spans[-1][1])
        for index, segment in enumerate(plan.segments)
        if segment.row_end == segment.row_start + 1
    }
    found = [ends.get(row, (-1, 0)) for row in range(plan.num_rows)]
    if any(end != _slot_of(tree, run) + 1 for run, (_, end) in zip(ordered, found, strict=True)):
        return None
    places = {id(run): place for place, run in enumerate(runs)}
    epochs = [run.node.epoch for run in runs]
    return _Last(runs, epochs, [places[id(run)] for run in ordered], plan, [index for index, _ in found])


def _slot_of(tree: KVTree, run: Run) -> int:
    return tree.spans(run.node, run.start, run.end)[0][0]


def plan_runs(tree: KVTree, runs: Sequence[Run]) -> tuple[list[Run], Plan]:
    """The runs in row order, and what their rows read. All K/V slots are placed already.

    A node has at most one kept run, and a run below a node that has one is attached at that run's start or before, or
    at its end: the scheduler sees to it.
    """
    roots, order = _collect_visits(runs)
    for visit in reversed(order):
        visit.entries.sort()  # no two of them are of the same run
        for _, _, entry in visit.entries:
            visit.num_rows += entry.num_rows
    row = 0
    for root in roots:
        root.row_start = row
        row += root.num_rows
    segments: list[_Open] = []
    ordered: list[tuple[int, Run]] = []
    for visit in order:
        _cut_node(tree, visit, segments, ordered)
    ordered.sort()  # no two of them begin with the same row
    done = tuple(
        Segment(tuple(seg.spans), seg.num_keys, seg.row_start, seg.row_end, seg.causal_rows) for seg in segments
    )
    return [run for _, run in ordered], Plan(row, done)


def _collect_visits(runs: Sequence[Run]) -> tuple[list[_Visit], list[_Visit]]:
    """Every node on a run's path, once; the roots, and all of them with parents before children."""
    visits: dict[NodeId, _Visit] = {}
    roots: list[_Visit] = []
    for index, run in enumerate(runs):
        # half a step behind the children attached at its start, before those at its end
        place = run.start + 0.5 if run.is_kept else float(run.end)
        below: _Visit | Run = run
        node: KVNode | None = run.node
        while node is not None:
            visit = visits.get(node.node_id)
            if visit is not None:
                visit.entries.append((place, index, below))
                break
            visit = visits[node.node_id] = _Visit(node)
            visit.entries.append((place, index, below))
            place, below, node = float(node.offset), visit, node.parent
            if node is None:
                roots.append(visit)
    order: list[_Visit] = []
    stack = list(reversed(roots))
    while stack:
        visit = stack.pop()
        order.append(visit)
        stack.extend(below for _, _, below in visit.entries if isinstance(below, _Visit))
    return roots, order


def _cut_node(tree: KVTree, visit: _Visit, segments: list[_Open], ordered: list[tuple[int, Run]]) -> None:
    """Emits the segments of one node; gives the nodes below and the node's own runs their first row."""
    row, row_end = visit.row_start, visit.row_start + visit.num_rows
    done = 0
    current = visit.above
    for place, _, below in visit.entries:
        is_single = not isinstance(below, _Visit) and below.is_kept and below.num_rows == 1
        upto = int(place) + is_single  # one new token sees every key up to its own: no causal part
        if upto > done:
            spans = tree.spans(visit.node, done, upto)
            current = _append(segments, current, _Open(spans, upto - done, row, row_end))
            done = upto
        row_past = row + below.num_rows
        if isinstance(below, _Visit):
            below.row_start = row
            if current is not None and current.row_start == row and current.row_end == row_past:
                below.above = current
        else:
            ordered.append((row, below))
            if below.is_kept and not is_single:
                spans = tree.spans(visit.node, below.start, below.end)
                segments.append(_Open(spans, below.num_rows, row, row_end, below.num_rows))
                done, current = below.end, None
        row = row_past


def _append(segments: list[_Open], current: _Open | None, new: _Open) -> _Open:
    """Lengthens the current segment when the same rows read on; else the new one is a segment of its own."""
    if current is None or current.row_start != new.row_start or current.row_end != new.row_end:
        segments.append(new)
        return new
    for span in new.spans:
        if current.spans[-1][1] == span[0]:
            current.spans[-1] = (current.spans[-1][0], span[1])
        else:
            current.spans.append(span)
    current.num_keys += new.num_keys
    return current
