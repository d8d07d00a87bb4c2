"""What strategies ask beside expansions: reflections and votes."""

from __future__ import annotations

from collections.abc import Hashable

from dendrite.dsl.functions import Function, OutOfBudget, together
from dendrite.dsl.node import Node, Question, Sampling, Step
from dendrite.dsl.run import Run, append_prompt
from dendrite.dsl.strategies.base import Reflect, Reflected, Vote, Voted
from dendrite.dsl.types import shown

_SAMPLING = Sampling(max_tokens=128, stop=(), temperature=0.0)
"""Of reflections: short ones, for they are read by all that comes after."""


async def reflect(run: Run, ask: Reflect) -> Reflected:
    """The model's answer, greedily; nothing where the budget ended."""
    step = run.steps[ask.node]
    try:
        answer = await run.ask(step, Question(ask.prompt, fresh=False, sampling=_SAMPLING))
    except OutOfBudget:
        return Reflected(ask.node, "")
    if ask.is_kept:
        criticise(step, ask, answer.text)
    return Reflected(ask.node, answer.text)


def criticise(step: Step, ask: Reflect, text: str) -> None:
    """Leave a reflection in the node's own text."""
    assert step.branch is not None, "nodes of a run have branches"
    append_prompt(step.branch, ask.prompt)
    append_prompt(step.branch, text)
    step.criticism += shown(ask.prompt) + text


async def vote(run: Run, function: Function, ask: Vote) -> Voted:
    """What each node votes for, as numbers in the order first seen.

    Raises:
        CallbackError: the function raised, or returned what cannot be hashed.
    """
    nodes = [Node(run.steps[node]) for node in ask.nodes]
    said = await together([function.run(node, [node]) for node in nodes])
    numbers: dict[Hashable, int] = {}
    ballots: list[int | None] = []
    for node, ballot in zip(nodes, said, strict=True):
        try:
            ballots.append(None if ballot is None else numbers.setdefault(ballot, len(numbers)))
        except TypeError:
            raise function.failed(f"returned {ballot!r}, which cannot be hashed", [node]) from None
    return Voted(ask.nodes, tuple(ballots))
