"""Judging one child: Observe, Merge and Score. Users' functions run here, on the thread that runs the search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dendrite.dsl.choice import Choice
from dendrite.dsl.functions import Function, OutOfBudget, answer, together
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Merge, Observe, Score
from dendrite.dsl.records import Outcome, Reject
from dendrite.dsl.run import Run, append_prompt
from dendrite.dsl.types import Prompt, shown
from dendrite.engine.arguments import as_number, shortened
from dendrite.engine.errors import CallbackError

Logprobs = list[list[float]]
Number = float | CallbackError | OutOfBudget


async def observe(run: Run, operation: Observe, step: Step) -> None:
    """Give the child its state, or drop it."""
    async with run.limit(operation.function, operation.concurrency):
        said = await answer(operation.function, Node(step), [Node(step)])
    if isinstance(said, Reject):
        step.status = "rejected"
        run.release(step)
        run.emit("rejected", step, str(said))
        return
    if isinstance(said, CallbackError | OutOfBudget):
        run.fail(step, said)
        return
    if isinstance(said, Outcome):
        _take_in(step, said)
    else:
        step.state = said
    run.emit("observed", step)


def _take_in(step: Step, outcome: Outcome[object]) -> None:
    assert step.branch is not None, "nodes of a run have branches"
    append_prompt(step.branch, outcome.append)
    step.tape += [outcome.append] if outcome.append else []
    step.appended = shown(outcome.append)
    step.state = outcome.state
    if outcome.goal or outcome.terminal:
        step.status = "goal" if outcome.goal else "terminal"


async def merge(run: Run, operation: Merge, step: Step) -> None:
    """Drop the child if an earlier node has its key."""
    key = await answer(operation.key, Node(step), [Node(step)])
    if isinstance(key, CallbackError | OutOfBudget):
        run.fail(step, key)
        return
    try:
        first = run.by_key.setdefault(key, step)
    except TypeError:
        run.fail(step, operation.key.failed(f"returned {key!r}, which cannot be hashed", [Node(step)]))
        return
    if first is not step:
        step.status = "merged"
        run.release(step)
        run.emit("merged", step, f"the same as {Node(first).name}")


async def score(run: Run, operations: Sequence[Score], step: Step) -> None:
    """Set the child's value to the weighted sum of its scores."""
    said: list[object] = []
    for operation in operations:
        if operation.takes_many:
            said.append(await run.gathering(operation).score(step))
        else:
            said.append(await answer(operation.function, Node(step), [Node(step)]))
    readings = await _readings(run, step, [answered for answered in said if isinstance(answered, Choice)])
    total = 0.0
    for operation, answered in zip(operations, said, strict=True):
        read = readings.pop(0) if isinstance(answered, Choice) else answered
        number = _number(operation.function, step, read)
        if isinstance(number, CallbackError | OutOfBudget):
            run.fail(step, number)
            return
        total += operation.weight * number
    step.value = total
    assert step.branch is not None, "nodes of a run have branches"
    step.branch.value = total
    run.emit("scored", step)


def _number(function: Function, step: Step, said: object) -> Number:
    if isinstance(said, CallbackError | OutOfBudget):
        return said
    if isinstance(said, Reject):
        return function.failed(f"raised Reject({said}), which only @observe may", [Node(step)])
    number = as_number(said)
    if number is None:
        return function.failed(f"returned {shortened(said)}, not a number or a Choice", [Node(step)])
    if not math.isfinite(number):
        return function.failed(f"returned {'NaN' if math.isnan(number) else number}, not a finite number", [Node(step)])
    return number


# --- choices -------------------------------------------------------------------------------------------------------


async def _readings(run: Run, step: Step, choices: Sequence[Choice]) -> list[float]:
    """What the choices read, in order. Those that put the same question share one branch, and so its prefill."""
    if not choices:
        return []
    asked: dict[str, list[Choice]] = {}
    for choice in choices:
        asked.setdefault(repr((choice.question, choice.fresh)), []).append(choice)
    answers = await together([_ask(run, step, group) for group in asked.values()])
    read = {
        id(choice): value
        for group, values in zip(asked.values(), answers, strict=True)
        for choice, value in zip(group, values, strict=True)
    }
    return [read[id(choice)] for choice in choices]


async def _ask(run: Run, step: Step, choices: Sequence[Choice]) -> list[float]:
    first = choices[0]
    transcript = Node(step).transcript
    with run.side_branch(step, first.question, fresh=first.fresh) as branch:
        logprobs = await together(
            [run.desk.score(branch, choice.continuations(transcript), priority=step.priority) for choice in choices]
        )
    neutral = await together([_neutral(run, choice) for choice in choices])
    return [choice.reading(read, alone) for choice, read, alone in zip(choices, logprobs, neutral, strict=True)]


async def _neutral(run: Run, choice: Choice) -> Logprobs | None:
    """What the labels have after the question alone, where the choice wants it; asked once in a run."""
    if choice.normalize != "unconditional":
        return None
    key = repr((choice.question, list(choice.labels)))
    return await run.once(key, lambda: _ask_neutral(run, choice.question, choice.continuations("")))


async def _ask_neutral(run: Run, question: Prompt, labels: Sequence[str]) -> Logprobs:
    if isinstance(question, str):
        branch = run.adopt(run.engine.root(question))
    else:
        branch = run.adopt(run.engine.root(messages=question))
    try:
        return await run.desk.score(branch, labels)
    finally:
        run.prune(branch)
