"""What the strategies share: keeping the best, finding a goal, refusing programs that give them nothing to go by."""

from __future__ import annotations

from dendrite.dsl.strategies.base import Candidate, ProgramFacts, Strategy
from dendrite.engine.arguments import is_whole
from dendrite.engine.errors import ProgramError


def best_of(first: Candidate, *others: Candidate) -> Candidate:
    """The goal that comes first, else the highest value, deeper first where equal, then the one that comes first."""
    return max((first, *others), key=lambda node: (node.is_goal, node.rank))


def check_counts(strategy: Strategy, **counts: object) -> None:
    """Refuse counts below 1.

    Raises:
        ProgramError: names the argument.
    """
    for name, count in counts.items():
        if not is_whole(count) or count < 1:
            raise ProgramError(f"{strategy}: {name}={count!r} cannot be used: give a whole number, 1 or more")


def check_has_score(strategy: Strategy, facts: ProgramFacts, why: str) -> None:
    """Refuse a program without a `@score`.

    Raises:
        ProgramError: says what it is needed for.
    """
    if not facts.has_score:
        raise ProgramError(f"{strategy} needs a @score {why}: decorate a function with @dd.score")


def check_tells_apart(strategy: Strategy, facts: ProgramFacts) -> None:
    """Refuse a program in which nothing tells one node from another.

    Raises:
        ProgramError: says what to add.
    """
    if not (facts.has_score or facts.has_observe):
        raise ProgramError(
            f"{strategy} has nothing to tell nodes apart by: add a @score, or an @observe that finds goals"
        )
