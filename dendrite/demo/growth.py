"""The search as a watcher knows it: built from its events alone, folded to as many rows as there is room for.

D  Daughter of the moon
├─ E  Evergreen trees stand tall
│  ├─ N  Nobody knows the way
│  └─ 3 let go, 6 break a rule (4 other letter, 2 wrong length)
└─ 8 break a rule (8 other letter)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import dendrite as dd
from dendrite.demo.task import Poem
from dendrite.dsl.types import StepId

RowKind = Literal["best", "kept", "let go", "broken", "folded"]
"""`best`: on the path of the best node; `kept`: may go on, or leads to one that may; `let go`: keeps the rules but
others were better; `broken`: breaks a rule; `folded`: stands for several."""

_FOLDS: Sequence[frozenset[RowKind]] = (
    frozenset(),
    frozenset({"broken"}),
    frozenset({"broken", "let go"}),
    frozenset({"broken", "let go", "folded"}),
    frozenset({"broken", "let go", "folded", "kept"}),
)
"""What has no row of its own, the next one while the rows do not fit. Where `folded` is among it, one row at the end
counts what is not shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the drawn tree."""

    rails: str
    kind: RowKind
    text: str
    letter: str = ""
    """The letter the line is to start with; empty for a folded row."""
    note: str = ""
    """Which rule it breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What came of one line of the poem."""

    number: int
    """Of the line, from 1."""
    letter: str
    num_tried: int
    num_right: int
    num_kept: int
    best: str
    """The line that the best beginning so far ends with; empty if none kept the rules."""


class Growth:
    """What has happened so far in a search for a poem on `word`. Feed it every event, in order."""

    def __init__(self, word: str) -> None:
        self.word = word
        self._nodes: list[dd.Node[Poem]] = []
        self._children: dict[StepId, list[dd.Node[Poem]]] = {}
        self._reasons: dict[StepId, str] = {}
        self._kept: set[StepId] = set()
        self._best: set[StepId] = set()

    def saw(self, event: dd.Event[Poem]) -> Round | None:
        """Take an event in; a `Round` with the one that ends a line for all beginnings."""
        node = event.node
        if event.kind == "expanded" and node.parent is not None:
            self._nodes.append(node)
            self._children.setdefault(node.parent.id, []).append(node)
        elif event.kind in ("rejected", "dropped"):
            self._reasons[node.id] = event.detail
        elif event.kind == "observed":
            self._kept.add(node.id)
        elif event.kind == "round":
            return self._settled(node, event.nodes)
        elif event.kind == "done":
            ended = [other for other in self._nodes if other.state.is_complete]
            return self._settled(node, ended)
        return None

    def rows(self, limit: int) -> list[Row]:
        """The tree in at most `limit` rows: whole if it fits, else with more and more of it folded away."""
        for fold in _FOLDS:
            rows = list(self._rows(fold))
            if "folded" in fold:
                rows.append(Row("", "folded", f"{len(self._nodes) - len(rows)} more lines tried"))
            if len(rows) <= limit:
                break
        return rows[-limit:]

    def _settled(self, best: dd.Node[Poem], survivors: Sequence[dd.Node[Poem]]) -> Round:
        depth = max((node.depth for node in self._nodes), default=0)
        tried = [node for node in self._nodes if node.depth == depth]
        self._best = {node.id for node in best.path}
        self._kept = {ancestor.id for node in (best, *survivors) for ancestor in node.path}
        return Round(
            number=depth,
            letter=self.word[depth - 1] if depth else "",
            num_tried=len(tried),
            num_right=sum(node.id not in self._reasons for node in tried),
            num_kept=sum(node.depth == depth for node in survivors),
            best=best.text.strip() if best.depth == depth else "",
        )

    def _kind(self, node: dd.Node[Poem]) -> RowKind:
        if node.id in self._best:
            return "best"
        if node.id in self._kept:
            return "kept"
        return "broken" if node.id in self._reasons else "let go"

    def _rows(self, fold: frozenset[RowKind]) -> Iterator[Row]:
        """Depth first, children under their parent; the first lines stand at the margin."""
        roots = self._entries(StepId(0), fold)
        pending = [("", "", entry) for entry in reversed(roots)]
        while pending:
            rails, under, entry = pending.pop()
            if isinstance(entry, str):
                yield Row(rails, "folded", entry)
                continue
            kind = self._kind(entry)
            note = self._reasons.get(entry.id, "")
            yield Row(rails, kind, entry.text.strip(), letter=self.word[entry.depth - 1], note=note)
            below = self._entries(entry.id, fold)
            branches = [(under + "├─ ", under + "│  ", child) for child in below[:-1]]
            branches += [(under + "└─ ", under + "   ", child) for child in below[-1:]]
            pending += reversed(branches)

    def _entries(self, parent: StepId, fold: frozenset[RowKind]) -> list[dd.Node[Poem] | str]:
        """The children that have a row of their own, and a text for all others."""
        children = self._children.get(parent, [])
        shown: list[dd.Node[Poem] | str] = [node for node in children if self._kind(node) not in fold]
        folded = [node for node in children if self._kind(node) in fold]
        return [*shown, self._folded(folded)] if folded and "folded" not in fold else shown

    def _folded(self, nodes: Sequence[dd.Node[Poem]]) -> str:
        reasons = Counter(self._reasons[node.id] for node in nodes if node.id in self._reasons)
        num_let_go = len(nodes) - reasons.total()
        parts = [f"{num_let_go} let go"] if num_let_go else []
        if reasons:
            listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            verb = "breaks" if reasons.total() == 1 else "break"
            parts.append(f"{reasons.total()} {verb} a rule ({listed})")
        return ", ".join(parts)
