"""A search's tree as pictures and rows: Graphviz, Mermaid, SVG and plain values; no library is needed for any."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TypeVar

from dendrite.dsl.node import Node
from dendrite.dsl.types import StepId

T = TypeVar("T")

_WIDTH, _HEIGHT, _GAP = 132, 40, 24  # of a node's box, and between boxes, in pixels
_CHARACTERS = 22
_COLOURS = {"open": "#e8eef7", "terminal": "#f3e9d2", "goal": "#cfe8cf", "pruned": "#f2f2f2"}
_PALE = "#f7dede"  # rejected, merged and dropped


def label(node: Node[object], *, length: int = _CHARACTERS) -> str:
    """The value and the beginning of a node's text on one line."""
    text = " ".join(node.text.split()) if node.parent is not None else "root"
    value = "" if node.value is None else f"{node.value:.3g}  "
    return value + (text if len(text) <= length else text[: length - 1] + "…")


def to_dot(nodes: Sequence[Node[object]], best: Node[object]) -> str:
    """Graphviz; the path to the best node is bold."""
    path = {node.id for node in best.path}
    lines = ["digraph search {", '  node [shape=box, style="rounded,filled", fontname="sans-serif"];']
    for node in nodes:
        text = label(node).replace("\\", "\\\\").replace('"', '\\"')
        bold = ", penwidth=2.5" if node.id in path else ""
        lines.append(f'  n{node.id} [label="{text}", fillcolor="{_colour(node)}"{bold}];')
    lines += [f"  n{node.parent.id} -> n{node.id};" for node in nodes if node.parent is not None]
    return "\n".join([*lines, "}"])


def to_mermaid(nodes: Sequence[Node[object]], best: Node[object]) -> str:
    """A Mermaid flowchart, as GitHub and MkDocs draw it."""
    path = {node.id for node in best.path}
    lines = ["flowchart TD"]
    for node in nodes:
        text = html.escape(label(node)).replace("\\", "&#92;").replace("`", "&#96;")
        lines.append(f'  n{node.id}["{text}"]')
        lines.append(f"  style n{node.id} fill:{_colour(node)}" + (",stroke-width:3px" if node.id in path else ""))
    lines += [f"  n{node.parent.id} --> n{node.id}" for node in nodes if node.parent is not None]
    return "\n".join(lines)


def to_svg(nodes: Sequence[Node[object]], best: Node[object]) -> str:
    """A drawing of its own: levels from top to bottom, leaves side by side, the best path in bold."""
    path = {node.id for node in best.path}
    columns = _columns(nodes)
    places = {
        node.id: (int(columns[node.id] * (_WIDTH + _GAP)) + _GAP, node.depth * (_HEIGHT + 2 * _GAP) + _GAP)
        for node in nodes
    }
    width = max(x for x, _ in places.values()) + _WIDTH + _GAP
    height = max(y for _, y in places.values()) + _HEIGHT + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">'
    )
    parts = [head]
    for node in nodes:
        if node.parent is not None:
            (x1, y1), (x2, y2) = places[node.parent.id], places[node.id]
            stroke = 2.5 if node.id in path else 1
            ends = f'x1="{x1 + _WIDTH // 2}" y1="{y1 + _HEIGHT}" x2="{x2 + _WIDTH // 2}" y2="{y2}"'
            parts.append(f'<line {ends} stroke="#555" stroke-width="{stroke}"/>')
    for node in nodes:
        x, y = places[node.id]
        stroke = 2.5 if node.id in path else 1
        title = html.escape(f"{node.name} [{node.status}]\n{node.text}")
        parts.append(
            f'<g><title>{title}</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" '
            f'fill="{_colour(node)}" stroke="#555" stroke-width="{stroke}"/>'
            f'<text x="{x + 6}" y="{y + _HEIGHT // 2 + 4}">{html.escape(label(node))}</text></g>'
        )
    return "\n".join([*parts, "</svg>"])


def _columns(nodes: Sequence[Node[object]]) -> dict[StepId, float]:
    """Where each node stands from left to right: leaves in their order, parents in the middle of their children."""
    children: dict[StepId, list[Node[object]]] = {node.id: [] for node in nodes}
    for node in nodes:
        if node.parent is not None:
            children[node.parent.id].append(node)
    order: list[Node[object]] = []
    pending = [nodes[0]]
    while pending:
        node = pending.pop()
        order.append(node)
        pending += reversed(children[node.id])
    columns: dict[StepId, float] = {}
    for number, leaf in enumerate(node for node in order if not children[node.id]):
        columns[leaf.id] = number
    for node in reversed(order):
        below = [columns[child.id] for child in children[node.id]]
        if below:
            columns[node.id] = (below[0] + below[-1]) / 2
    return columns


def _colour(node: Node[object]) -> str:
    return _COLOURS.get(node.status, _PALE)


def rows_of(nodes: Sequence[Node[object]], best: Node[object], state: Callable[[object], T]) -> list[dict[str, object]]:
    """A flat row a node, as data frames want them; `state` makes plain values of states."""
    path = {node.id for node in best.path}
    return [
        {
            "id": node.id,
            "parent": None if node.parent is None else node.parent.id,
            "name": node.name,
            "depth": node.depth,
            "text": node.text,
            "value": node.value,
            "logprob": node.logprob,
            "status": node.status,
            "on_best_path": node.id in path,
            "state": state(node.state),
        }
        for node in nodes
    ]
