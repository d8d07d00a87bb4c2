"""The kinds of case that the suite runs, as data. Imports no library: peers in other environments read the same cases.

Every case is a thing that a search does to an engine. How large it is stands in `dendrite.bench.sizes`.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from dendrite.engine.errors import RequestError

TEMPERATURE = 0.8
CUE = (777, 778, 779, 780)
"""What is appended to ask for a value, before one token is generated."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of one workload."""

    workload: ClassVar[str]
    figure: ClassVar[str] = "time"
    """What is measured: `time` is that of one repetition."""
    unit: ClassVar[str] = "ms"

    @property
    def name(self) -> str:
        """For people, unique in the suite."""
        return f"{self.workload}: {self.title}"

    @property
    def title(self) -> str:
        """For people, unique in its workload."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens of the longest path."""
        raise NotImplementedError

    @property
    def requested(self) -> int:
        """Tokens of all prompts of a repetition: what an engine computes that shares nothing."""
        raise NotImplementedError

    def num_rounds(self, usual: int) -> int:
        """How often it is measured."""
        return usual


@dataclass(frozen=True, slots=True)
class Decode(Case):
    """Separate prompts decoded in one batch; a step's time is the difference between two lengths."""

    workload = "decode"
    figure = "step"

    batch: int
    prompt: int
    short: int
    long: int

    @property
    def title(self) -> str:
        """The batch."""
        return f"batch {self.batch}"

    @property
    def length(self) -> int:
        """The longer of the two."""
        return self.prompt + self.long

    @property
    def requested(self) -> int:
        """Every prompt for each of the two lengths."""
        return 2 * self.batch * self.prompt


@dataclass(frozen=True, slots=True)
class Fanout(Case):
    """Branches off one warm prefix."""

    workload = "fanout"

    prefix: int
    branches: int
    tokens: int

    @property
    def title(self) -> str:
        """Branches, tokens of each, and what they share."""
        return f"{self.branches} × {self.tokens} over {self.prefix:,}"

    @property
    def length(self) -> int:
        """One branch's path."""
        return self.prefix + self.tokens

    @property
    def requested(self) -> int:
        """The prefix for each branch."""
        return self.branches * self.prefix


@dataclass(frozen=True, slots=True)
class FirstToken(Case):
    """Children of a warm parent, each with one token of its own appended, to the first token that they generate."""

    workload = "first-token"

    prefix: int
    children: int

    @property
    def title(self) -> str:
        """Children and their parent's length."""
        return f"{self.children} {'child' if self.children == 1 else 'children'} of {self.prefix:,}"

    @property
    def length(self) -> int:
        """A child's path."""
        return self.prefix + 2

    @property
    def requested(self) -> int:
        """The prefix for each child."""
        return self.children * (self.prefix + 1)

    def num_rounds(self, usual: int) -> int:
        """Eight times as often: it is over so soon, and what wakes whom takes now more, now less."""
        return 8 * usual


@dataclass(frozen=True, slots=True)
class Thoughts(Case):
    """Tree of Thoughts (Yao et al., 2023), breadth first, from a cold prompt: expand, a value token each, keep some."""

    workload = "tot"

    prompt: int
    depth: int
    keep: int
    branch: int
    tokens: int

    @property
    def title(self) -> str:
        """Depth, branching factor, survivors, tokens of a thought."""
        return f"depth {self.depth}, branch {self.branch}, keep {self.keep}, {self.tokens} tokens"

    @property
    def length(self) -> int:
        """A leaf's path with the cue."""
        return self.prompt + self.depth * self.tokens + len(CUE) + 1

    @property
    def requested(self) -> int:
        """Every thought's path so far, and again with itself and the cue."""
        num = [self.branch * (self.keep if depth else 1) for depth in range(self.depth)]
        paths = [2 * (self.prompt + depth * self.tokens) + self.tokens + len(CUE) for depth in range(self.depth)]
        return sum(map(operator.mul, num, paths))


@dataclass(frozen=True, slots=True)
class MonteCarlo(Case):
    """MCTS one iteration after the other, from a cold prompt: expand a node that is there, then a value of each child.

    Which node is drawn from the same random numbers for every engine.
    """

    workload = "mcts"

    prompt: int
    iterations: int
    branch: int
    tokens: int

    @property
    def title(self) -> str:
        """Iterations, children of an expansion and their tokens."""
        return f"{self.iterations} iterations, {self.branch} × {self.tokens} tokens"

    @property
    def length(self) -> int:
        """The deepest path with the cue."""
        return self.prompt + max(self.depths()) * self.tokens + len(CUE) + 1

    @property
    def requested(self) -> int:
        """Every child's path so far, and again with itself and the cue."""
        depths = self.depths()
        paths = [2 * (self.prompt + depths[pick] * self.tokens) + self.tokens + len(CUE) for pick in self.picks()]
        return self.branch * sum(paths)

    def num_rounds(self, usual: int) -> int:
        """Twice is enough: it has many parts."""
        return min(usual, 2)

    def picks(self) -> list[int]:
        """The node that each iteration expands: 0 is the root, then children in the order they were made."""
        draw = random.Random(1)
        return [draw.randrange(1 + number * self.branch) for number in range(self.iterations)]

    def depths(self) -> list[int]:
        """Expansions between the root and each node, itself included."""
        depths = [0]
        for pick in self.picks():
            depths += [depths[pick] + 1] * self.branch
        return depths


@dataclass(frozen=True, slots=True)
class Score(Case):
    """Log-probabilities of several continuations of a warm prefix."""

    workload = "score"

    prefix: int
    choices: int
    tokens: int

    @property
    def title(self) -> str:
        """Choices, their tokens, and what they continue."""
        return f"{self.choices} × {self.tokens} tokens after {self.prefix:,}"

    @property
    def length(self) -> int:
        """One choice's path."""
        return self.prefix + self.tokens + 1

    @property
    def requested(self) -> int:
        """The prefix for each choice."""
        return self.choices * (self.prefix + self.tokens)


@dataclass(frozen=True, slots=True)
class Memory(Case):
    """K/V held by branches that have generated, each token of the tree counted once or more."""

    workload = "memory"
    figure = "K/V held"
    unit = "MB"

    prefix: int
    branches: int
    tokens: int

    @property
    def title(self) -> str:
        """Branches, tokens of each, and what they share."""
        return f"{self.branches} × {self.tokens} over {self.prefix:,}"

    @property
    def length(self) -> int:
        """One branch's path."""
        return self.prefix + self.tokens

    @property
    def requested(self) -> int:
        """The prefix for each branch."""
        return self.branches * self.prefix

    def num_rounds(self, usual: int) -> int:
        """Once: memory does not vary."""
        return min(usual, 1)


KINDS: Mapping[str, Callable[..., Case]] = {
    kind.workload: kind for kind in (Decode, Fanout, FirstToken, Thoughts, MonteCarlo, Score, Memory)
}
WORKLOADS = ("fork", *KINDS)
"""In the order they are run. `fork` is measured call by call, see `dendrite.bench.fork`."""


def to_message(case: Case) -> dict[str, object]:
    """Plain values, for a peer."""
    return {"workload": case.workload, **asdict(case)}


def from_message(message: Mapping[str, object]) -> Case:
    """The case that `to_message` wrote."""
    return KINDS[str(message["workload"])](**{name: value for name, value in message.items() if name != "workload"})


class Prompts:
    """Random prompts: every engine draws the same ones for a case, and no two cases share a beginning."""

    LOWEST, HIGHEST = 1000, 120_000
    """Token ids are drawn from this range, or from what the vocabulary has of it."""

    def __init__(self, case: Case, vocab_size: int) -> None:
        self._draw = random.Random(case.name)
        self._high = min(self.HIGHEST, vocab_size)
        self._low = min(self.LOWEST, self._high // 2)

    def tokens(self, num: int) -> list[int]:
        """The next `num` token ids."""
        return [self._draw.randrange(self._low, self._high) for _ in range(num)]


def cue(vocab_size: int) -> list[int]:
    """`CUE` in this vocabulary."""
    return [token % vocab_size for token in CUE]


def check_workloads(names: tuple[str, ...]) -> None:
    """Refuse what there is not.

    Raises:
        RequestError: names the workloads there are.
    """
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise RequestError(f"there is no workload {unknown[0]!r}: give {', '.join(WORKLOADS)}")
