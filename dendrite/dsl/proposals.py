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
from dendrite.dsl.types import Prompt, as_finite, is_prompt, shown
from dendrite.engine.arguments import is_whole, shortened
from dendrite.engine.errors import CallbackError, ConstraintError, ContextOverflow

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


def not_expanded(run: Run, parent: Step, failure: CallbackError | ContextOverflow | Reject | OutOfBudget) -> None:
    """Go on without some of a node's children, or raise the failure if the program says so."""
    if isinstance(failure, CallbackError | ContextOverflow) and run.on_error == "raise":
        raise failure
    run.emit("dropped", parent, str(failure))


def _proposals(run: Run, source: Source, parent: Step, said: object) -> list[Proposal]:
    if _failed(said):
        not_expanded(run, parent, said)
        return []
    gen = Gen(said) if is_prompt(said) and not _is_children(said) else said
    wrong = _wrong_with(gen)
    if wrong is not None:
        assert source.function is not None, "a constant cue was checked by compile()"
        not_expanded(run, parent, source.function.failed(f"returned {wrong}", [Node(parent)]))
        return []
    if _is_children(gen):
        return [_made(source, child) for child in gen]
    assert isinstance(gen, Gen), "nothing else passes"
    return [] if _has_no_choice(gen) else [_generated(source, parent, gen)]


def _wrong_with(said: object) -> str | None:
    """Why what a function returned cannot be used; None if it can."""
    if _is_children(said):
        return next(filter(None, map(_wrong_with_child, said)), None)
    if not isinstance(said, Gen):
        return f"{shortened(said)}, not a cue, a Gen or a list of Children"
    if not is_prompt(said.cue):
        return f"a Gen whose cue {shortened(said.cue)} is neither text nor chat messages"
    if said.max_tokens is not None and not (is_whole(said.max_tokens) and said.max_tokens > 0):
        return f"a Gen with max_tokens={shortened(said.max_tokens)}: give a whole number, 1 or more"
    return None


def _wrong_with_child(child: Child[object]) -> str | None:
    prior = as_finite(child.prior)
    text: object = child.text
    if not isinstance(text, str) or not is_prompt(text):
        return f"a Child whose text {shortened(child.text)} is none that can be encoded"
    if prior is None or prior < 0:
        return f"a Child with prior={shortened(child.prior)}: give a finite number, 0 or more"
    return None


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
        weights = [proposal.prior for proposal in pool]
        (index,) = dice.choices(range(len(pool)), weights=weights if any(weights) else None)
        chosen.append(replace(pool[index], width=1))
        if pool[index].is_made:
            del pool[index]
    return chosen
