"""A step of a search: the user's read-only view of it, and the record that the search loop keeps behind that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol

from dendrite.dsl.turns import Turn
from dendrite.dsl.types import Prompt, S_co, StepId
from dendrite.engine.constraints import Constraint
from dendrite.engine.errors import BranchError

if TYPE_CHECKING:  # at run time this file must not load pydantic, which the branch's options are made of
    from dendrite.engine.branch import Branch
    from dendrite.engine.generation import Generation

NodeStatus = Literal["open", "terminal", "goal", "rejected", "merged", "dropped", "pruned"]
"""`open` may be expanded; `rejected` by the user's `@observe`; `merged` because an earlier node has the same key;
`dropped` because a function failed on it or the budget ended within it; `pruned` because others were better."""


class Node(Generic[S_co]):
    r"""A step of a search, as the functions of a program see it. Made by the search; `dendrite.testing.node` for tests.

    Example:
        @dd.expand(width=5, stop="\n")
        def step(node: dd.Node[Game]) -> str:
            return f"\nLeft: {node.state.left}. Step:"
    """

    __slots__ = ("__weakref__", "_step")

    def __init__(self, step: Step) -> None:
        self._step = step

    @property
    def id(self) -> StepId:
        """Its number in this search, in the order made; the root is 0."""
        return self._step.id

    @property
    def name(self) -> str:
        """Its place in the tree, by position among siblings: `root/2/0`."""
        return "/".join(["root", *(str(step.index) for step in self._step.path[1:])])

    @property
    def text(self) -> str:
        """This step alone: what was generated, without its cue, or the text of a `Child`; empty at the root."""
        return self._step.text

    @property
    def transcript(self) -> str:
        """Everything from the prompt, as it was given, to the end of this step; chat messages as `role: content`."""
        return "".join(
            part for step in self._step.path for part in (step.cue, step.text, step.appended, step.criticism)
        )

    @property
    def state(self) -> S_co:
        """The user's state here: what `@observe` or a `Child` gave, else the parent's."""
        state: S_co = self._step.state  # type: ignore[assignment]  # compile() checked that S fits the whole program
        return state

    @property
    def parent(self) -> Node[S_co] | None:
        """The step before; None at the root."""
        return None if self._step.parent is None else Node(self._step.parent)

    @property
    def path(self) -> Sequence[Node[S_co]]:
        """From the root to this step, both included."""
        return [Node(step) for step in self._step.path]

    @property
    def depth(self) -> int:
        """Steps from the root, which is at 0."""
        return self._step.depth

    @property
    def value(self) -> float | None:
        """The weighted sum of its scores; None before it was scored."""
        return self._step.value

    @property
    def logprob(self) -> float | None:
        """Mean log-probability of the tokens of this step; None at the root and where nothing was generated."""
        return self._step.logprob

    @property
    def status(self) -> NodeStatus:
        """What became of it so far."""
        return self._step.status

    @property
    def reflections(self) -> Sequence[str]:
        """What a strategy that reflects learned from failures, oldest first; empty under the others."""
        return self._step.reflections

    @property
    def branch(self) -> Branch:
        """Its branch of the engine's tree: fork it to go on from here by hand. Pruned once the search let go of it.

        Raises:
            BranchError: a node of a unit test, which has none.
        """
        if self._step.branch is None:
            raise BranchError(
                "this node has no branch: give dendrite.testing.node an engine=, such as a scripted_engine(...)"
            )
        return self._step.branch

    async def ask(
        self,
        prompt: Prompt,
        *,
        fresh: bool = False,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        constraint: Constraint | None = None,
    ) -> Generation:
        r"""Ask the model a side question. It leaves nothing behind: the search goes on as if it had not been asked.

            reply = await node.ask(f"Possible next steps from {node.state.left}:\n", fresh=True, max_tokens=100)

        Several asks may run at the same time (`asyncio.gather`); they share the engine's batches.

        Args:
            prompt: text that continues the transcript, or messages for the chat that the search was started on.
            fresh: do not read the transcript; text is then a user's turn of a new chat.
            max_tokens: most tokens of the answer.
            stop: strings that end it.
            temperature: 0 takes the likeliest token; above, asks of one node differ from each other.
            constraint: what the answer must match.

        Returns:
            The finished generation. Its branch is pruned already.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_tokens=max_tokens, stop=stops, temperature=temperature, constraint=constraint)
        question = Question(prompt, fresh, sampling)
        self.branch  # noqa: B018 - a node without a branch says so
        assert self._step.asker is not None, "a step with a branch has an asker"
        return await self._step.asker.ask(self._step, question)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and other._step is self._step

    def __hash__(self) -> int:
        return id(self._step)

    def __repr__(self) -> str:
        value = "" if self.value is None else f" value={self.value:.3g}"
        return f"<Node {self.name} {self.text[:40]!r}{value} {self.status}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a step's text is generated."""

    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A side question on its way to the engine."""

    prompt: Prompt
    fresh: bool
    sampling: Sampling


class Asker(Protocol):
    """Whoever can put a side question to the engine: a run, or a unit test."""

    async def ask(self, step: Step, question: Question) -> Generation:
        """Generate the answer on a temporary branch and prune that."""


@dataclass(slots=True, eq=False, kw_only=True)
class Step:
    """What the search loop keeps of a node. The loop writes it, users read it through `Node`."""

    id: StepId
    parent: Step | None
    index: int
    """Its position among its parent's children."""
    state: object
    cue: str = ""
    """What stands before `text` in the transcript; at the root, the prompt."""
    text: str = ""
    appended: str = ""
    """What `@observe` put after it."""
    criticism: str = ""
    """Reflections that stay in its text, question and answer."""
    tape: list[Any] = field(default_factory=list)
    """What its branch is its parent's and: prompts, and `{"tokens": [...]}` where text was generated."""
    prior: float = 1.0
    logprob: float | None = None
    """Mean log-probability of the tokens of `text`, where it is known."""
    value: float | None = None
    status: NodeStatus = "open"
    reflections: tuple[str, ...] = ()
    branch: Branch | None = None
    asker: Asker | None = None
    num_children: int = 0
    num_asks: int = 0
    num_proposals: int = 0
    is_made: bool = False
    """Whether `@expand` made it itself."""
    made: set[str] = field(default_factory=set)
    """Texts of its children that `@expand` made itself."""
    turn: Turn = field(default_factory=lambda: Turn(None))
    """Its place in the line of all children, in the order asked."""
    is_told: bool = False
    """Whether the strategy knows of it, or of what became of it."""
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1

    @property
    def priority(self) -> float:
        """What its work is worth to the engine: its parent's value, so that siblings stay together."""
        return self.parent.value or 0.0 if self.parent is not None else 0.0

    @property
    def path(self) -> list[Step]:
        """From the root to here."""
        path: list[Step] = []
        step: Step | None = self
        while step is not None:
            path.append(step)
            step = step.parent
        return path[::-1]
