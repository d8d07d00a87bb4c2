"""Draft, criticise, revise (Self-Refine, Madaan et al., 2023)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dendrite.dsl.strategies.base import (
    Ask,
    Candidate,
    Expand,
    Expanded,
    ProgramFacts,
    Reflect,
    Reflected,
    Strategy,
    Told,
)
from dendrite.dsl.strategies.common import best_of, check_counts
from dendrite.dsl.types import Prompt, StepId, is_prompt
from dendrite.engine.errors import ProgramError


@dataclass(frozen=True, slots=True)
class SelfRefineState:
    """A chain: root ── draft ── critique ── revision ── critique ── revision."""

    latest: Candidate
    """The draft that is revised next."""
    best: Candidate
    num_drafts: int = 0
    is_awaited: bool = False
    is_criticised: bool = True
    """Whether `latest` may be revised; the root needs no critique."""
    is_over: bool = False


class SelfRefine(Strategy[SelfRefineState]):
    """A draft, and `rounds` revisions at most, each of the one before; the best of them all is returned.

        dd.compile(write, check, passed, strategy=dd.SelfRefine(rounds=3))

    What is wrong with a draft is said by an `@observe` that appends it, such as a test runner, or by the model, in
    answer to `critique`, which stays in the text that the revision continues. Of several children the best is revised.
    Without a score the last revision is the best. A goal ends the search.

    Args:
        rounds: revisions at most.
        critique: what the model is asked about each draft; None leaves criticism to `@observe`.
    """

    def __init__(self, rounds: int, *, critique: Prompt | None = None) -> None:
        self.rounds = rounds
        self.critique = critique

    def check(self, facts: ProgramFacts) -> None:
        """Refuse fewer than 1 round, and a program in which nobody criticises."""
        check_counts(self, rounds=self.rounds)
        if self.critique is not None and not (self.critique and is_prompt(self.critique)):
            raise ProgramError(f"{self}: critique={self.critique!r} is no question: give text, or chat messages")
        if self.critique is None and not facts.has_observe:
            raise ProgramError(
                f"in {self} nobody says what is wrong with a draft: give critique=, or an @observe that appends it"
            )

    def begin(self, root: Candidate, seed: int = 0) -> SelfRefineState:
        """The draft is the root's child; nothing is drawn."""
        del seed
        return SelfRefineState(latest=root, best=root)

    def ask(self, state: SelfRefineState) -> tuple[SelfRefineState, Sequence[Ask]]:
        """The critique of the latest draft, then its revision."""
        if state.is_awaited or state.is_over or state.num_drafts > self.rounds:
            return state, ()
        waiting = replace(state, is_awaited=True)
        if self.critique is not None and not state.is_criticised:
            return waiting, (Reflect(state.latest.id, self.critique, is_kept=True),)
        return waiting, (Expand(state.latest.id),)

    def tell(self, state: SelfRefineState, told: Told) -> SelfRefineState:
        """Take the best revision further, whether or not it is better than what it revised."""
        state = replace(state, is_awaited=False)
        if isinstance(told, Reflected):
            return replace(state, is_criticised=True)
        assert isinstance(told, Expanded), "nothing else was asked"
        if not told.children:
            return replace(state, is_over=True)
        latest = best_of(*told.children)
        return replace(
            state,
            latest=latest,
            best=best_of(state.best, latest),
            num_drafts=state.num_drafts + 1,
            is_criticised=False,
            is_over=latest.is_terminal,
        )

    def best(self, state: SelfRefineState) -> StepId:
        """The goal, else the highest value, the later one where equal."""
        return state.best.id

    def live(self, state: SelfRefineState) -> Collection[StepId]:
        """The latest draft and the best."""
        return {state.latest.id, state.best.id}

    def __str__(self) -> str:
        critique = "" if self.critique is None else f", critique={self.critique!r}"
        return f"SelfRefine(rounds={self.rounds}{critique})"
