"""What one run holds: its nodes, and every branch it made, so that none is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dendrite.dsl.desk import Desk
from dendrite.dsl.events import Event, EventKind
from dendrite.dsl.functions import Function, OutOfBudget
from dendrite.dsl.gathering import Gathering
from dendrite.dsl.meter import Meter
from dendrite.dsl.node import Node, Question, Step
from dendrite.dsl.operations import Score
from dendrite.dsl.turns import Turn
from dendrite.dsl.types import OnError, Prompt, StepId, shown
from dendrite.engine.errors import CallbackError, ContextOverflow
from dendrite.engine.messages import Message

if TYPE_CHECKING:  # at run time this file must not load pydantic
    from dendrite.engine.branch import Branch
    from dendrite.engine.engine import Engine
    from dendrite.engine.generation import Generation


T = TypeVar("T")


class Run:
    """The nodes and branches of one run. Operations work on it; the search loop closes it."""

    def __init__(
        self,
        engine: Engine,
        *,
        seed: int | None,
        meter: Meter,
        on_error: OnError,
        scores: Sequence[Score] = (),
        wants_logprobs: bool = False,
    ) -> None:
        self.engine = engine
        self.seed = seed
        self.meter = meter
        self.on_error = on_error
        self.wants_logprobs = wants_logprobs
        self.desk = Desk(engine)
        self.steps: list[Step] = []
        self.reflections: list[str] = []
        self.by_key: dict[Hashable, Step] = {}  # the first node of each key, where a program merges nodes
        self._branches: set[Branch] = set()  # all that this run made and has not pruned
        self._gatherings = {score: Gathering(score) for score in scores if score.takes_many}
        self._cues: dict[str, list[int]] = {}
        self._limits: dict[Function, asyncio.Semaphore] = {}
        self._answers: dict[str, asyncio.Task[Any]] = {}
        self._last_turns: dict[str, Turn] = {}
        self._events: list[Event[object]] = []
        self._news: asyncio.Future[None] | None = None

    # --- nodes -------------------------------------------------------------------------------------------------

    def open_root(self, origin: Branch | None, prompt: Prompt, state: object) -> Step:
        """The node that the search starts from: a new chat's assistant turn, or a fork of the user's `origin`."""
        if origin is None:
            branch = self.adopt(self.engine.root(messages=as_messages(prompt), seed=self.seed))
            text = shown(prompt, first=True)
        else:
            branch = self.adopt(origin.fork(1, seed=self.seed)[0])
            append_prompt(branch, prompt)
            text = origin.text + shown(prompt)
        return self._add(Step(id=StepId(0), parent=None, index=0, state=state, cue=text, branch=branch, asker=self))

    def add_child(
        self, parent: Step, branch: Branch, *, cue: str, text: str | None, prior: float, state: object
    ) -> Step:
        """A new node below `parent` that owns `branch`; `text` is of one that the user made."""
        step = Step(
            id=StepId(len(self.steps)),
            parent=parent,
            index=parent.num_children,
            state=state,
            cue=cue,
            text=text or "",
            is_made=text is not None,
            prior=prior,
            branch=branch,
            asker=self,
            reflections=parent.reflections,
            turn=self.next_turn("children"),
        )
        parent.num_children += 1
        if text is not None:
            parent.made.add(text)
        self.expect(step)
        return self._add(step)

    def rebuild_child(self, row: Mapping[str, Any], state: object) -> Step:
        """A node as a journal has it: the same text on a new branch, whose K/V is computed when it is needed."""
        parent = self.steps[row["parent"]]
        assert parent.branch is not None, "nodes of a run have branches"
        (branch,) = parent.branch.fork(1, seed=self.seed_for(parent, "expand", row["index"]))
        text = row["text"] if row["is_made"] else None
        step = self.add_child(parent, self.adopt(branch), cue=row["cue"], text=text, prior=row["prior"], state=state)
        step.turn.end()
        self.leave(step)
        for part in row["tape"]:
            if isinstance(part, dict):
                if part["tokens"]:
                    branch.append(part["tokens"])
            else:
                append_prompt(branch, part)
        branch.record.logprobs = list(row["logprobs"])
        branch.value = row["value"]
        step.tape, step.reflections = row["tape"], tuple(row["reflections"])
        for name in ("text", "appended", "logprob", "value", "status", "num_asks"):
            setattr(step, name, row[name])
        if step.status in ("rejected", "merged", "dropped"):
            self.release(step)
        return step

    def step_of(self, node: Node[object]) -> Step | None:
        """The record behind a user's node; None for a node of another search."""
        step = self.steps[node.id] if node.id < len(self.steps) else None
        return step if step is not None and Node(step) == node else None

    def fail(self, step: Step, failure: CallbackError | ContextOverflow | OutOfBudget) -> None:
        """Drop a node that a function failed on or that has no room, or raise the failure if the program says so."""
        if not isinstance(failure, OutOfBudget) and self.on_error == "raise":
            raise failure
        self.drop(step, str(failure))

    def drop(self, step: Step, why: str) -> None:
        """Give a node up and go on without it."""
        step.status = "dropped"
        self.release(step)
        self.emit("dropped", step, why)

    def _add(self, step: Step) -> Step:
        self.steps.append(step)
        return step

    # --- branches ----------------------------------------------------------------------------------------------

    def adopt(self, branch: Branch) -> Branch:
        """Take responsibility for pruning a new branch."""
        self._branches.add(branch)
        return branch

    def prune(self, branch: Branch) -> None:
        """Give a branch of this run up."""
        self._branches.discard(branch)
        branch.prune()

    def release(self, step: Step) -> None:
        """Prune the branch of a node that the search is done with; the node stays readable."""
        if step.branch is not None:
            self.prune(step.branch)

    def is_live(self, step: Step) -> bool:
        """Whether the node's branch can still be used."""
        return step.branch in self._branches

    def count_live(self) -> int:
        """Nodes whose branches can still be used."""
        return sum(map(self.is_live, self.steps))

    def close(self, keep: Sequence[Step] = ()) -> None:
        """End the run: prune all that it made but the branches of `keep`, deepest first, and forget the nodes.

        The nodes' users keep them; a run that did not forget them would be a cycle, which only the garbage collector
        could free, and with it the K/V of the best path.
        """
        kept = {step.branch for step in keep}
        for branch in sorted(self._branches - kept, key=lambda branch: -branch.depth):
            self.prune(branch)
        self._branches.clear()
        self.steps = []
        self.by_key = {}
        for gathering in self._gatherings.values():
            gathering.close()
        for task in self._answers.values():
            task.cancel()
        self.meter.lift()

    def append_cue(self, branch: Branch, cue: Prompt, *, is_constant: bool) -> None:
        """Append a cue; a constant one is tokenised once in a run."""
        if not (is_constant and isinstance(cue, str)):
            append_prompt(branch, cue)
            return
        if cue not in self._cues:
            self._cues[cue] = self.engine.tokenizer.encode(cue)
        branch.append(self._cues[cue])

    # --- asking the engine -------------------------------------------------------------------------------------

    async def ask(self, step: Step, question: Question) -> Generation:
        """Answer a side question on a temporary branch; see `Node.ask`."""
        granted = await self.meter.reserve_soon(question.sampling.max_tokens)
        used = 0
        try:
            with self.side_branch(step, question.prompt, fresh=question.fresh) as branch:
                sampling = replace(question.sampling, max_tokens=granted)
                answer = await self.desk.generate(branch, sampling, priority=step.priority)
                used = len(answer.token_ids)
                return answer
        finally:
            self.meter.settle_tokens(granted, used)

    @contextmanager
    def side_branch(self, step: Step, prompt: Prompt, *, fresh: bool) -> Iterator[Branch]:
        """A temporary branch that ends with `prompt`, after the node's transcript or on a root of its own."""
        seed = self.seed_for(step, "ask", step.num_asks)
        step.num_asks += 1
        if fresh:
            branch = self.adopt(self.engine.root(messages=as_messages(prompt), seed=seed))
        else:
            assert step.branch is not None, "nodes of a run have branches"
            branch = self.adopt(step.branch.fork(1, seed=seed)[0])
        try:
            if not fresh:
                append_prompt(branch, prompt)
            yield branch
        finally:
            self.prune(branch)

    def seed_for(self, step: Step, what: Literal["ask", "draw", "expand"], number: int) -> int | None:
        """A seed for the side question or the proposal `number` of a node; None in a run without a seed.

        It depends on nothing else, so a search draws the same wherever and whenever it runs, and whatever it is asked.
        """
        if self.seed is None:
            return None
        words = "/".join(map(str, (self.seed, *(above.index for above in step.path), what, number)))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")

    async def once(self, key: str, ask: Callable[[], Coroutine[object, object, T]]) -> T:
        """The answer to a question that is asked once in a run, whoever asks and how often."""
        if key not in self._answers:
            self._answers[key] = asyncio.get_running_loop().create_task(ask())
        answer: T = await asyncio.shield(self._answers[key])
        return answer

    # --- who waits for whom ------------------------------------------------------------------------------------

    def limit(self, function: Function, concurrency: int | None) -> AbstractAsyncContextManager[object]:
        """Lets `concurrency` calls of the function in at a time."""
        if concurrency is None:
            return nullcontext()
        return self._limits.setdefault(function, asyncio.Semaphore(concurrency))

    def gathering(self, score: Score) -> Gathering:
        """Where nodes wait for a score of many."""
        return self._gatherings[score]

    def expect(self, comer: Hashable) -> None:
        """It may bring nodes to be scored with others."""
        for gathering in self._gatherings.values():
            gathering.expect(comer)

    def leave(self, comer: Hashable) -> None:
        """It brings no more of them."""
        for gathering in self._gatherings.values():
            gathering.leave(comer)

    def next_turn(self, line: Literal["asks", "children"]) -> Turn:
        """A place at the end of a line."""
        turn = self._last_turns[line] = Turn(self._last_turns.get(line))
        return turn

    def draw_seed(self) -> int:
        """What a strategy may draw from."""
        return random.getrandbits(53) if self.seed is None else self.seed

    # --- telling watchers --------------------------------------------------------------------------------------

    def emit(self, kind: EventKind, step: Step, detail: str = "", nodes: Sequence[Step] = ()) -> None:
        """Queue an event for whoever watches."""
        self._events.append(Event(kind, Node(step), nodes=tuple(map(Node, nodes)), detail=detail))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def take_events(self) -> list[Event[object]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def news(self) -> asyncio.Future[None]:
        """Done with the next event."""
        self._news = asyncio.get_running_loop().create_future()
        return self._news


def as_messages(prompt: Prompt) -> Sequence[Message]:
    """Text is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def append_prompt(branch: Branch, prompt: Prompt) -> None:
    """Append text as it is, messages through the chat template; nothing for an empty prompt."""
    if isinstance(prompt, str):
        if prompt:
            branch.append(prompt)
    elif prompt:
        branch.append(messages=prompt)
