"""Propose: what the children of a node continue, and which of the proposals a strategy gets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from dendrite.dsl.functions import OutOfBudget, answer
from dendrite.dsl.node import Node, Sampling, Step
from dendrite.dsl.operations import Source
from dendrite.dsl.records import Child, Gen, Reject
from dendrite.dsl.run import Run
from dendrite.dsl.types import Prompt, is_prompt, shown
from dendrite.engine.errors import CallbackError, ConstraintError

MAX_REFLECTIONS = 3
"""A node sees the newest: more would fill its prompt (Reflexion, Shinn et al., 2023, keeps one to three)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What some children of a node continue: `width` generated ones, or one that the user made."""

    cue: Prompt
    """For a child that the user made, its text."""
    is_made: bool = False
    is_constant: bool = False
    """Whether the cue is the same for every node."""
    state: object
    prior: float
    width: int = 1
    sampling: Sampling


async def propose(run: Run, sources: Sequence[Source], parent: Step) -> list[Proposal]:
    """Ask every source; proposals in the order of the sources."""
    parent.reflections = tuple(run.reflections[-MAX_REFLECTIONS:])
    proposals: list[Proposal] = []
    for source in sources:
        proposals += _proposals(
            run, source, parent, await _prepared(run, source, parent, await _answer(source, parent))
        )
    for proposal in proposals:
        run.emit("proposed", parent, proposal.cue if isinstance(proposal.cue, str) else shown(proposal.cue))
    return proposals


async def _answer(source: Source, parent: Step) -> object:
    """What the source says of the node; an empty list where `when=` leaves it out."""
    node = Node(parent)
    if source.when is not None:
        is_wanted = await answer(source.when, node, [node])
        if _failed(is_wanted):
            return is_wanted
        if not is_wanted:
            return []
    return source.cue if source.function is None else await answer(source.function, node, [node])


async def _prepared(run: Run, source: Source, parent: Step, said: object) -> object:
    """What was said, with its constraint compiled for this engine, or why that cannot be done."""
    if source.sampling.constraint is not None:
        await run.engine.prepare(source.sampling.constraint)
    if not isinstance(said, Gen) or _has_no_choice(said):
        return said
    try:
        constraint = said.constraint
        if constraint is not None:
            await run.engine.prepare(constraint)
    except ConstraintError as error:
        assert source.function is not None, "only functions return a Gen"
        failure = source.function.failed(f"returned a Gen that cannot be used: {error}", [Node(parent)])
        failure.__cause__ = error
        return failure
    return said


def _has_no_choice(gen: Gen) -> bool:
    return gen.choices is not None and not gen.choices


def _failed(said: object) -> TypeGuard[CallbackError | Reject | OutOfBudget]:
    return isinstance(said, CallbackError | Reject | OutOfBudget)


def _not_expanded(run: Run, parent: Step, failure: CallbackError | Reject | OutOfBudget) -> None:
    if isinstance(failure, CallbackError) and run.on_error == "raise":
        raise failure
    run.emit("dropped", parent, str(failure))


def _proposals(run: Run, source: Source, parent: Step, said: object) -> list[Proposal]:
    if _failed(said):
        _not_expanded(run, parent, said)
        return []
    if isinstance(said, Gen):
        return [] if _has_no_choice(said) else [_generated(source, parent, said)]
    if _is_children(said):
        return [_made(source, child) for child in said]
    if is_prompt(said):
        return [_generated(source, parent, Gen(said))]
    assert source.function is not None, "a constant cue was checked by compile()"
    failure = source.function.failed(f"returned {said!r}, not a cue, a Gen or a list of Children", [Node(parent)])
    _not_expanded(run, parent, failure)
    return []


def _is_children(said: object) -> TypeGuard[Sequence[Child[object]]]:
    return isinstance(said, list | tuple) and all(isinstance(child, Child) for child in said)


def _generated(source: Source, parent: Step, gen: Gen) -> Proposal:
    """What the `Gen` says goes before what the decorator says."""
    sampling = replace(
        source.sampling,
        max_tokens=source.sampling.max_tokens if gen.max_tokens is None else gen.max_tokens,
        constraint=gen.constraint or source.sampling.constraint,
    )
    return Proposal(
        cue=gen.cue,
        is_constant=source.function is None,
        state=parent.state,
        prior=source.prior,
        width=source.width,
        sampling=sampling,
    )


def _made(source: Source, child: Child[object]) -> Proposal:
    prior = source.prior * child.prior
    return Proposal(cue=child.text, is_made=True, state=child.state, prior=prior, sampling=source.sampling)


def drawn(proposals: Sequence[Proposal], num: int, *, made: set[str], seed: int | None) -> list[Proposal]:
    """`num` children of the proposals, drawn by prior; what the user made is drawn once at most.

    Args:
        proposals: all that the program proposes for a node.
        num: how many children a strategy wants.
        made: texts of children that the user made and the node has already.
        seed: equal seeds draw the same.
    """
    dice = random.Random(seed)
    pool = [proposal for proposal in proposals if not (proposal.is_made and str(proposal.cue) in made)]
    chosen: list[Proposal] = []
    while pool and len(chosen) < num:
        if len(pool) == 1 and not pool[0].is_made:  # siblings that share their cue
            return [*chosen, replace(pool[0], width=num - len(chosen))]
        (index,) = dice.choices(range(len(pool)), weights=[proposal.prior for proposal in pool])
        chosen.append(replace(pool[index], width=1))
        if pool[index].is_made:
            del pool[index]
    return chosen
