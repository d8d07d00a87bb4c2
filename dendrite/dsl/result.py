"""What a search returns: the best node, the tree it came from, and what it took."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, Self

from dendrite.dsl import drawing
from dendrite.dsl.meter import Usage
from dendrite.dsl.node import Node
from dendrite.dsl.types import S, StepId

if TYPE_CHECKING:  # only the type; a tree prints without rich
    from rich.text import Text

Stopped = Literal["goal", "done", "budget", "cancelled"]
_SHOWN_CHARACTERS = 72


class Tree(Generic[S]):
    """All nodes of a search, those that were pruned or rejected too. Printing it draws it.

    root
    ├─ * 0.91  4 + 9 = 13 (left: 10 13 13)
    │  └─ * 1  13 + 13 = 26 …  [goal]
    └─ 0.2  10 - 4 = 6  [pruned]
    """

    def __init__(self, nodes: Sequence[Node[S]], best: Node[S]) -> None:
        self._nodes = nodes
        self._best = best
        self._children: dict[StepId, list[Node[S]]] = {}
        for node in nodes:
            if node.parent is not None:
                self._children.setdefault(node.parent.id, []).append(node)

    @property
    def root(self) -> Node[S]:
        """The node that the search started from."""
        return self._nodes[0]

    def children(self, node: Node[S]) -> Sequence[Node[S]]:
        """The children of a node, in the order made."""
        return self._children.get(node.id, [])

    def __iter__(self) -> Iterator[Node[S]]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def to_dict(self) -> dict[str, object]:
        """Plain values: the id of the best node, and a row for each node in the order made, parents first."""
        return {"best": self._best.id, "nodes": [_row(node) for node in self._nodes]}

    def to_json(self) -> str:
        """`to_dict` as JSON; what JSON does not know is written as its `repr`."""
        return json.dumps(self.to_dict(), default=repr, ensure_ascii=False)

    def to_rows(self) -> list[dict[str, object]]:
        """A flat row a node: `pandas.DataFrame(result.tree.to_rows())`."""
        return drawing.rows_of(self._nodes, self._best, _plain)

    def to_dot(self) -> str:
        """The tree for Graphviz; the best path is bold."""
        return drawing.to_dot(self._nodes, self._best)

    def to_mermaid(self) -> str:
        """The tree as a Mermaid flowchart."""
        return drawing.to_mermaid(self._nodes, self._best)

    def to_svg(self) -> str:
        """The tree as a drawing that any browser shows; whole texts are its tooltips."""
        return drawing.to_svg(self._nodes, self._best)

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto;max-height:32em">{self.to_svg()}</div>'

    def __str__(self) -> str:
        on_path = {node.id for node in self._best.path}
        lines = []
        pending = [(self.root, "", "")]  # (node, what stands before it, what stands before its children)
        while pending:
            node, before, below = pending.pop()
            lines.append(before + _line(node, on_path))
            children = self.children(node)
            ends = [("├─ ", "│  ")] * (len(children) - 1) + [("└─ ", "   ")]
            rows = [(child, below + tee, below + bar) for child, (tee, bar) in zip(children, ends, strict=False)]
            pending += reversed(rows)
        return "\n".join(lines)

    def __rich__(self) -> Text:
        from rich.text import Text  # noqa: PLC0415 - only a terminal that is rich asks for it

        return Text(str(self), no_wrap=True, overflow="ellipsis")


class Result(Generic[S]):
    """The end of a search. Only the best path stays live in the engine, until `close` or the end of the `with`.

    with program.run(engine, "Use 4 9 10 13 to make 24.") as result:
        print(result.best.transcript)
        more = result.best.branch.fork()      # go on from there
    """

    def __init__(self, *, nodes: Sequence[Node[S]], best: Node[S], stopped: Stopped, usage: Usage) -> None:
        self.best = best
        self.stopped: Stopped = stopped
        """Why it ended: a goal was found, the strategy was done, the budget ended, or it was cancelled."""
        self.usage = usage
        self.tree = Tree(nodes, best)

    @property
    def leaves(self) -> Sequence[Node[S]]:
        """The ends of the paths that stood at the end, best first: no pruned, rejected or dropped ones."""
        standing = [node for node in self.tree if node.status in ("open", "terminal", "goal")]
        ends = [node for node in standing if not self.tree.children(node)]
        return sorted(ends, key=lambda node: -float("inf") if node.value is None else node.value, reverse=True)

    @property
    def path(self) -> Sequence[Node[S]]:
        """From the root to the best node."""
        return self.best.path

    def to_dict(self) -> dict[str, object]:
        """Plain values: how it ended, what it took, and the tree."""
        return {"stopped": self.stopped, "usage": dataclasses.asdict(self.usage), **self.tree.to_dict()}

    def to_json(self) -> str:
        """`to_dict` as JSON; what JSON does not know is written as its `repr`."""
        return json.dumps(self.to_dict(), default=repr, ensure_ascii=False)

    def _repr_html_(self) -> str:
        best = html.escape(self.best.transcript)
        usage = self.usage
        took = f"{self.stopped}; {usage.nodes} nodes, {usage.tokens_generated} tokens, {usage.seconds:.1f} s"
        return f"<p><b>{took}</b></p><pre>{best}</pre>{self.tree._repr_html_()}"

    def close(self) -> None:
        """Prune the best path. Nodes stay readable; calling again is fine."""
        for node in reversed(self.best.path):
            node.branch.prune()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Result stopped={self.stopped!r} nodes={len(self.tree)} best={self.best!r}>"


def _row(node: Node[S]) -> dict[str, object]:
    return {
        "id": node.id,
        "parent": None if node.parent is None else node.parent.id,
        "depth": node.depth,
        "text": node.text,
        "value": node.value,
        "status": node.status,
        "state": _plain(node.state),
    }


def _plain(state: object) -> object:
    return dataclasses.asdict(state) if dataclasses.is_dataclass(state) and not isinstance(state, type) else state


def _line(node: Node[S], on_path: set[StepId]) -> str:
    text = " ".join(node.text.split()) if node.parent is not None else "root"
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 1] + "…"
    value = "" if node.value is None else f"{node.value:.3g}  "
    best = "* " if node.id in on_path and node.parent is not None else ""
    status = "" if node.status == "open" else f"  [{node.status}]"
    return f"{best}{value}{text}{status}"
