"""Judging children: Observe, Score and Select. Users' functions run here, between the engine's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import SupportsFloat

from dendrite.dsl.choice import Choice
from dendrite.dsl.expansion import Wave
from dendrite.dsl.functions import Function, OutOfBudget, answer, run_each, together
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Observe, Score, Select
from dendrite.dsl.records import Outcome, Reject
from dendrite.dsl.run import Run, append_prompt
from dendrite.dsl.types import shown
from dendrite.engine.errors import CallbackError

Logprobs = list[list[float]]


async def observe(run: Run, operation: Observe, wave: Wave) -> None:
    """Give every child its state; drop those that were rejected."""
    nodes = [Node(step) for step in wave.children]
    answers = await run_each(operation.function, nodes, concurrency=operation.concurrency)
    for step, said in zip(wave.children, answers, strict=True):
        _observed(run, step, said)
    wave.children = [step for step in wave.children if run.is_live(step)]


def _observed(run: Run, step: Step, said: object) -> None:
    if isinstance(said, Reject):
        step.status = "rejected"
        run.release(step)
        run.emit("rejected", step, str(said))
    elif isinstance(said, CallbackError | OutOfBudget):
        run.fail(step, said)
    elif isinstance(said, Outcome):
        _take_in(step, said)
        run.emit("observed", step)
    else:
        step.state = said
        run.emit("observed", step)


def _take_in(step: Step, outcome: Outcome[object]) -> None:
    assert step.branch is not None, "nodes of a run have branches"
    append_prompt(step.branch, outcome.append)
    step.appended = shown(outcome.append)
    step.state = outcome.state
    if outcome.goal or outcome.terminal:
        step.status = "goal" if outcome.goal else "terminal"


async def score(run: Run, operation: Score, wave: Wave) -> None:
    """Add the function's score to the value of each child; of the first goal alone, if there is one."""
    goal = next((step for step in wave.children if step.status == "goal"), None)
    steps = wave.children if goal is None else [goal]
    said = await (_many if operation.takes_many else _singly)(operation, steps)
    numbers = await _numbers(run, operation.function, steps, said)
    for step, number in zip(steps, numbers, strict=True):
        if isinstance(number, CallbackError | OutOfBudget):
            run.fail(step, number)
            continue
        step.value = (step.value or 0.0) + operation.weight * number
        assert step.branch is not None, "nodes of a run have branches"
        step.branch.value = step.value
        run.emit("scored", step)
    wave.children = [step for step in wave.children if run.is_live(step)]


async def _singly(operation: Score, steps: Sequence[Step]) -> list[object]:
    return await run_each(operation.function, [Node(step) for step in steps])


async def _many(operation: Score, steps: Sequence[Step]) -> list[object]:
    """Calls over batches of nodes, one after the other; a failure counts for its whole batch."""
    said: list[object] = []
    size = operation.batch or max(1, len(steps))
    for start in range(0, len(steps), size):
        nodes = [Node(step) for step in steps[start : start + size]]
        batch = await answer(operation.function, nodes, nodes)
        if isinstance(batch, CallbackError | OutOfBudget | Reject):
            said += [batch] * len(nodes)
            continue
        scores = _listed(batch)
        if scores is None or len(scores) != len(nodes):
            what = repr(batch) if scores is None else f"{len(scores)} scores for {len(nodes)} nodes"
            said += [operation.function.failed(f"returned {what}, not one number a node", nodes)] * len(nodes)
            continue
        said += scores
    return said


def _listed(batch: object) -> list[object] | None:
    """The elements of a sequence, an array or a tensor."""
    try:
        return None if isinstance(batch, str) else list(batch)  # type: ignore[call-overload]
    except TypeError:
        return None


async def _numbers(
    run: Run, function: Function, steps: Sequence[Step], said: Sequence[object]
) -> list[float | CallbackError | OutOfBudget]:
    read = await _read_choices(run, steps, said)
    return [
        _number(function, step, read.get(index, value))
        for index, (step, value) in enumerate(zip(steps, said, strict=True))
    ]


def _number(function: Function, step: Step, said: object) -> float | CallbackError | OutOfBudget:
    if isinstance(said, CallbackError | OutOfBudget):
        return said
    if isinstance(said, Reject):
        return function.failed(f"raised Reject({said}), which only @observe may", [Node(step)])
    if not isinstance(said, SupportsFloat):
        return function.failed(f"returned {said!r}, not a number or a Choice", [Node(step)])
    number = float(said)
    return function.failed("returned NaN", [Node(step)]) if math.isnan(number) else number


# --- choices -------------------------------------------------------------------------------------------------------


async def _read_choices(run: Run, steps: Sequence[Step], said: Sequence[object]) -> dict[int, float]:
    """The readings of those answers that are choices, by their index; all asked of the engine together."""
    asked = {index: value for index, value in enumerate(said) if isinstance(value, Choice)}
    neutral = await _neutral_readings(run, asked.values()) if asked else {}
    logprobs = await together([_ask_choice(run, steps[index], choice) for index, choice in asked.items()])
    return {
        index: choice.reading(tokens, neutral.get(_neutral_key(choice)))
        for (index, choice), tokens in zip(asked.items(), logprobs, strict=True)
    }


async def _ask_choice(run: Run, step: Step, choice: Choice) -> Logprobs:
    with run.side_branch(step, choice.question, fresh=choice.fresh) as branch:
        return await branch.ascore_tokens(choice.continuations(Node(step).transcript))


async def _neutral_readings(run: Run, choices: Iterable[Choice]) -> dict[str, Logprobs]:
    """What the labels have after the question alone, once for each question and set of labels."""
    unconditional = {_neutral_key(choice): choice for choice in choices if choice.normalize == "unconditional"}
    read = await together([_ask_neutral(run, choice) for choice in unconditional.values()])
    return dict(zip(unconditional, read, strict=True))


async def _ask_neutral(run: Run, choice: Choice) -> Logprobs:
    question = choice.question
    if isinstance(question, str):
        branch = run.adopt(run.engine.root(question))
    else:
        branch = run.adopt(run.engine.root(messages=question))
    try:
        return await branch.ascore_tokens(choice.continuations(""))
    finally:
        run.prune(branch)


def _neutral_key(choice: Choice) -> str:
    return repr((choice.question, list(choice.labels)))


# --- selecting -----------------------------------------------------------------------------------------------------


async def select(run: Run, operation: Select, steps: Sequence[Step]) -> list[Step]:
    """The survivors, best first: ordered by value, chosen by the function, cut to `keep`."""
    ordered = ranked(steps)
    if operation.function is not None:
        nodes = [Node(step) for step in ordered]
        said = await operation.function.run(nodes, nodes)
        ordered = survivors(run, operation.function, ordered, said)
    return ordered[: operation.keep]


def ranked(steps: Sequence[Step]) -> list[Step]:
    """Best first; equal ones in the order made."""
    return sorted(steps, key=lambda step: -math.inf if step.value is None else step.value, reverse=True)


def survivors(run: Run, function: Function, candidates: Sequence[Step], said: object) -> list[Step]:
    """The records of the nodes that a `@prune` function returned.

    Raises:
        CallbackError: something else than some of the candidates, each at most once.
    """
    nodes = _listed(said)
    given = [Node(step) for step in candidates]
    if nodes is None or not all(isinstance(node, Node) and node in given for node in nodes):
        raise function.failed(f"returned {said!r}, not a list of nodes it was given", given)
    steps = [run.step_of(node) for node in nodes if isinstance(node, Node)]
    if len(set(map(id, steps))) < len(steps):
        raise function.failed("returned a node twice", given)
    return [step for step in steps if step is not None]
