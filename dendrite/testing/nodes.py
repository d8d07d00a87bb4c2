"""Nodes without a search, to call the functions of a program with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dendrite.dsl.meter import Meter
from dendrite.dsl.node import Node, Step
from dendrite.dsl.run import Run
from dendrite.dsl.types import S, StepId

if TYPE_CHECKING:  # a node without an engine must not load torch
    from dendrite.engine.engine import Engine

_NO_STATE: Any = None  # as in `Program.run`


def node(
    text: str = "",
    *,
    state: S = _NO_STATE,
    transcript: str = "",
    depth: int | None = None,
    value: float | None = None,
    reflections: Sequence[str] = (),
    engine: Engine | None = None,
) -> Node[S]:
    r"""A node for a unit test of a decorated function.

        assert step(node("4 + 9 = 13", state=Game((10, 13, 13)))) == "\nStep:"

    Args:
        text: of this step.
        state: of this step and of those above it.
        transcript: everything up to this step; `text` is put after it unless it ends with it already.
        depth: steps above it; 1 for a node with text, else 0, a root.
        value: as if it had been scored.
        reflections: as a strategy that reflects would have left them.
        engine: gives it a branch, so that `ask` and `branch` work: a `scripted_engine(...)`, or one with a model.
    """
    step: Step | None = None
    for index in range((1 if text else 0) if depth is None else depth):
        step = Step(id=StepId(index), parent=step, index=0, state=state)
    number = 0 if step is None else step.id + 1
    step = Step(id=StepId(number), parent=step, index=0, state=state, text=text, cue=transcript.removesuffix(text))
    step.value = value
    step.reflections = tuple(reflections)
    if engine is not None:
        before = Node(step).transcript
        step.branch = engine.root(before) if before else engine.root(messages=[{"role": "user", "content": ""}])
        step.asker = Run(engine, seed=None, meter=Meter(engine, None), on_error="raise")
    return Node(step)
