"""Making children: Propose, Append, Fork and Generate, over all nodes of a wave at once.

node ── cue (one fork) ──┬── child      siblings share the K/V of their cue
                         ├── child
                         └── child
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeGuard

from dendrite.dsl.functions import Function, OutOfBudget, run_each, together
from dendrite.dsl.node import Node, Sampling, Step
from dendrite.dsl.operations import Source
from dendrite.dsl.records import Child, Gen, Reject
from dendrite.dsl.run import Run, append_prompt
from dendrite.dsl.types import Prompt, StepId, is_prompt, shown
from dendrite.engine.errors import CallbackError, ProgramError

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch


@dataclass(slots=True, kw_only=True)
class Proposal:
    """What some children of a node continue: `width` generated ones, or one that the user made."""

    parent: Step
    cue: Prompt
    """For a child that the user made, its text."""
    is_made: bool = False
    state: object
    prior: float
    width: int = 1
    sampling: Sampling
    seed: int | None = None
    branch: Branch | None = None
    """A fork of the parent with the cue appended; None where there is none to append."""


@dataclass(slots=True)
class Wave:
    """The expansions that run together."""

    parents: list[Step]
    proposals: list[Proposal] = field(default_factory=list)
    growing: list[tuple[Step, Sampling]] = field(default_factory=list)
    """Children whose text is still to be generated."""
    children: list[Step] = field(default_factory=list)
    """In the order of their parents and proposals; shrinks as some are rejected or dropped."""

    def families(self) -> dict[StepId, list[Step]]:
        """The children of each parent."""
        families: dict[StepId, list[Step]] = {parent.id: [] for parent in self.parents}
        for child in self.children:
            assert child.parent is not None, "a child has a parent"
            families[child.parent.id].append(child)
        return families


async def propose(run: Run, sources: Sequence[Source], wave: Wave) -> None:
    """Ask every source about every node; proposals in the order of nodes, then sources."""
    answers = [await _answers(source, wave.parents) for source in sources]
    for index, parent in enumerate(wave.parents):
        for source, given in zip(sources, answers, strict=True):
            wave.proposals += _proposals(run, source, parent, given[index])


async def _answers(source: Source, parents: Sequence[Step]) -> list[object]:
    """What the source says of each parent; an empty list where `when=` leaves it out."""
    nodes = [Node(parent) for parent in parents]
    wanted: list[object] = [True] * len(nodes)
    if source.when is not None:
        wanted = await run_each(source.when, nodes)
    chosen = [node for node, is_wanted in zip(nodes, wanted, strict=True) if is_wanted and not _failed(is_wanted)]
    said = iter([source.cue] * len(chosen) if source.function is None else await run_each(source.function, chosen))
    return [is_wanted if _failed(is_wanted) else next(said) if is_wanted else [] for is_wanted in wanted]


def _failed(answer: object) -> TypeGuard[CallbackError | Reject | OutOfBudget]:
    return isinstance(answer, CallbackError | Reject | OutOfBudget)


def _not_expanded(run: Run, parent: Step, failure: CallbackError | Reject | OutOfBudget) -> None:
    if isinstance(failure, CallbackError) and run.on_error == "raise":
        raise failure
    run.emit("dropped", parent, str(failure))


def _proposals(run: Run, source: Source, parent: Step, answer: object) -> list[Proposal]:
    if _failed(answer):
        _not_expanded(run, parent, answer)
        return []
    if isinstance(answer, Gen):
        _refuse_constraint(source.function, answer)
        return [_generated(source, parent, answer.cue, answer.max_tokens)]
    if _is_children(answer):
        return [_made(source, parent, child) for child in answer]
    if is_prompt(answer):
        return [_generated(source, parent, answer, None)]
    assert source.function is not None, "a constant cue was checked by compile()"
    failure = source.function.failed(f"returned {answer!r}, not a cue, a Gen or a list of Children", [Node(parent)])
    _not_expanded(run, parent, failure)
    return []


def _is_children(answer: object) -> TypeGuard[Sequence[Child[object]]]:
    return isinstance(answer, list | tuple) and all(isinstance(child, Child) for child in answer)


def _refuse_constraint(function: Function | None, gen: Gen) -> None:
    if gen.constraint is not None:
        place = function.place if function else "expand"
        raise ProgramError(
            f"{place} returned a Gen with {gen.constraint}=: constraints come with a later version; until then "
            "return dd.Child(...)ren of your own, or check the text in @observe and raise dd.Reject"
        )


def _generated(source: Source, parent: Step, cue: Prompt, max_tokens: int | None) -> Proposal:
    sampling = source.sampling if max_tokens is None else replace(source.sampling, max_tokens=max_tokens)
    return Proposal(
        parent=parent, cue=cue, state=parent.state, prior=source.prior, width=source.width, sampling=sampling
    )


def _made(source: Source, parent: Step, child: Child[object]) -> Proposal:
    return Proposal(
        parent=parent,
        cue=child.text,
        is_made=True,
        state=child.state,
        prior=source.prior * child.prior,
        sampling=source.sampling,
    )


def append(run: Run, wave: Wave) -> None:
    """One fork of the node for every proposal that has something to append."""
    for proposal in wave.proposals:
        parent = proposal.parent
        assert parent.branch is not None, "nodes of a run have branches"
        proposal.seed = run.seed_for(parent, "expand", parent.num_proposals)
        parent.num_proposals += 1
        if proposal.cue:
            (branch,) = parent.branch.fork(1, seed=proposal.seed)
            proposal.branch = run.adopt(branch)
            append_prompt(branch, proposal.cue)


def fork(run: Run, wave: Wave) -> None:
    """The children's branches and records, as many as the budget allows."""
    for proposal in wave.proposals:
        num = run.meter.take_nodes(proposal.width)
        for branch in _forked(run, proposal, num):
            step = run.add_child(
                proposal.parent,
                branch,
                cue="" if proposal.is_made else shown(proposal.cue),
                prior=proposal.prior,
                state=proposal.state,
            )
            wave.children.append(step)
            if proposal.is_made:
                step.text = str(proposal.cue)
                run.emit("expanded", step)
            else:
                wave.growing.append((step, proposal.sampling))


def _forked(run: Run, proposal: Proposal, num: int) -> list[Branch]:
    if proposal.branch is not None and num == 1 == proposal.width:
        return [proposal.branch]
    base = proposal.branch or proposal.parent.branch
    assert base is not None, "nodes of a run have branches"
    branches = [run.adopt(branch) for branch in base.fork(num, seed=proposal.seed)] if num else []
    if proposal.branch is not None:
        run.prune(proposal.branch)
    return branches


async def generate(run: Run, wave: Wave) -> None:
    """Generate all growing children together; near the end of a budget of tokens, as many as it surely covers."""
    queue = wave.growing
    while queue:
        batch: list[tuple[Step, Sampling]] = []
        for step, sampling in queue:
            granted = run.meter.reserve_tokens(sampling.max_tokens)
            if not granted:
                break
            batch.append((step, replace(sampling, max_tokens=granted)))
        if not batch:
            break
        await _generate_batch(run, batch)
        queue = queue[len(batch) :]
    for step, _ in queue:
        run.fail(step, OutOfBudget("the budget of tokens ended"))
        wave.children.remove(step)


async def _generate_batch(run: Run, batch: Sequence[tuple[Step, Sampling]]) -> None:
    groups: dict[Sampling, list[Step]] = {}
    for step, sampling in batch:
        groups.setdefault(sampling, []).append(step)
    await together([_generate_group(run, steps, sampling) for sampling, steps in groups.items()])
    for step, _ in batch:
        run.emit("expanded", step)


async def _generate_group(run: Run, steps: Sequence[Step], sampling: Sampling) -> None:
    branches = [step.branch for step in steps if step.branch is not None]
    for step, generation in zip(steps, await run.generate(branches, sampling), strict=True):
        step.text = generation.text
        run.meter.settle_tokens(sampling.max_tokens, len(generation.token_ids))
