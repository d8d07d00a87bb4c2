"""One expansion: Propose, Append and Fork for a node, then Generate, Observe, Merge and Score for each child.

node ── cue (one fork) ──┬── child ─► generate ─► observe ─► score      siblings share the K/V of their cue;
                         ├── child ─► generate ─────────► observe …     each goes on as soon as it is done
                         └── child ─► …
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dendrite.dsl import judging
from dendrite.dsl.functions import OutOfBudget, joined
from dendrite.dsl.node import Sampling, Step
from dendrite.dsl.operations import Expansion, Loop, Merge, Observe, Score
from dendrite.dsl.proposals import Proposal, drawn, not_expanded, propose
from dendrite.dsl.run import Run
from dendrite.dsl.strategies.base import Expand
from dendrite.dsl.turns import Turn
from dendrite.dsl.types import shown
from dendrite.engine.errors import ContextOverflow

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch


@dataclass(frozen=True, slots=True)
class Brood:
    """What an expansion made."""

    children: list[Step]
    """All of them, those that were rejected or dropped too."""
    num_proposals: int
    """How many its node had had by then: the next one's seed depends on it."""


async def expand(run: Run, loop: Loop, ask: Expand, turn: Turn) -> Brood:
    """Make the children that a strategy asked for.

    Args:
        run: what they belong to.
        loop: the program's.
        ask: the node, and how many children.
        turn: children are forked in the order asked, so that their numbers and what a budget grants them are the same
            in every run.
    """
    parent = run.steps[ask.node]
    children: list[Step] = []
    num_proposals = parent.num_proposals
    try:
        proposals = await propose(run, loop.sources, parent)
        await turn.come()
        if ask.width is not None:
            seed = run.seed_for(parent, "draw", parent.num_proposals)
            proposals = drawn(proposals, ask.width, made=parent.made, seed=seed)
        async with joined() as group:
            for proposal in proposals:
                await _start(run, loop.body, parent, proposal, children=children, group=group)
            num_proposals = parent.num_proposals
            turn.end()
            run.leave(turn)
            if run.wants_logprobs:
                await _weigh(run, parent, [step for step in children if step.is_made])
    finally:
        turn.end()
        run.leave(turn)
        for step in children:  # some may not have started growing
            step.turn.end()
            run.leave(step)
    return Brood(children, num_proposals)


async def _start(
    run: Run,
    body: Sequence[Expansion],
    parent: Step,
    proposal: Proposal,
    *,
    children: list[Step],
    group: asyncio.TaskGroup,
) -> None:
    """Fork a proposal's children, as many as the budget allows, and let them grow."""
    try:
        branches = _forks(run, parent, proposal)
    except ContextOverflow as failure:
        not_expanded(run, parent, failure)
        return
    for branch in branches:
        step = run.add_child(
            parent,
            branch,
            cue="" if proposal.is_made else shown(proposal.cue),
            text=str(proposal.cue) if proposal.is_made else None,
            prior=proposal.prior,
            state=proposal.state,
        )
        children.append(step)
        step.tape += [proposal.cue] if proposal.cue else []
        run.emit("forked", step)
        sampling = None if proposal.is_made else proposal.sampling
        if sampling is not None:
            try:
                sampling = replace(sampling, max_tokens=await run.meter.reserve_soon(sampling.max_tokens))
            except OutOfBudget as failure:
                step.turn.end()
                run.fail(step, failure)
                run.leave(step)
                continue
        group.create_task(_grow(run, body, step, sampling))


def _forks(run: Run, parent: Step, proposal: Proposal) -> Sequence[Branch]:
    """The cue once, on a fork of the node; a fork of that for every child."""
    num = run.meter.take_nodes(proposal.width, count_live=run.count_live)
    seed = run.seed_for(parent, "expand", parent.num_proposals)
    parent.num_proposals += 1
    assert parent.branch is not None, "nodes of a run have branches"
    if not num:
        return []
    if not proposal.cue:
        return [run.adopt(branch) for branch in parent.branch.fork(num, seed=seed)]
    (base,) = (run.adopt(branch) for branch in parent.branch.fork(1, seed=seed))
    try:
        run.append_cue(base, proposal.cue, is_constant=proposal.is_constant)
    except ContextOverflow:
        run.prune(base)
        raise
    if num == 1 == proposal.width:
        return [base]
    branches = [run.adopt(branch) for branch in base.fork(num, seed=seed)]
    run.prune(base)
    return branches


async def _weigh(run: Run, parent: Step, made: Sequence[Step]) -> None:
    """How likely the model finds the children that the user made: one pass over all of them."""
    worded = [step for step in made if step.text]
    if worded:
        assert parent.branch is not None, "nodes of a run have branches"
        read = await run.desk.score(parent.branch, [step.text for step in worded], priority=parent.priority)
        for step, logprobs in zip(worded, read, strict=True):
            step.logprob = sum(logprobs) / len(logprobs)


async def _grow(run: Run, body: Sequence[Expansion], step: Step, sampling: Sampling | None) -> None:
    """One child from its fork to its value."""
    try:
        if sampling is not None:
            await _generate(run, step, sampling)
        if run.is_live(step):
            run.emit("expanded", step)
        for operation in body:
            if isinstance(operation, Observe) and run.is_live(step):
                await judging.observe(run, operation, step)
            elif isinstance(operation, Merge):
                await step.turn.come()
                if run.is_live(step):
                    await judging.merge(run, operation, step)
        step.turn.end()
        scores = [operation for operation in body if isinstance(operation, Score)]
        if scores and run.is_live(step):
            await judging.score(run, scores, step)
        run.meter.look()
    except ContextOverflow as failure:
        run.fail(step, failure)
    finally:
        step.turn.end()
        run.leave(step)


async def _generate(run: Run, step: Step, sampling: Sampling) -> None:
    assert step.branch is not None, "nodes of a run have branches"
    used = 0
    try:
        generation = await run.desk.generate(step.branch, sampling, priority=step.priority, logprobs=run.wants_logprobs)
        used = len(generation.token_ids)
    finally:
        run.meter.settle_tokens(sampling.max_tokens, used)
    step.text = generation.text
    step.tape.append({"tokens": list(generation.token_ids)})
    logprobs = generation.logprobs
    step.logprob = sum(logprobs) / len(logprobs) if logprobs else None
    if generation.error is not None:
        run.drop(step, str(generation.error))
    run.meter.look()
