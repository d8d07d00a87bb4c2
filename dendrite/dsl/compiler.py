"""`dd.compile`: collects the parts of a program, checks them, and lowers them to tree operations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dendrite.dsl.functions import Function
from dendrite.dsl.marks import AnyMark, ExpandMark, ObserveMark, PruneMark, ScoreMark, mark_of
from dendrite.dsl.node import Sampling
from dendrite.dsl.operations import (
    Append,
    Expansion,
    Fork,
    Generate,
    Loop,
    Merge,
    Observe,
    Open,
    Operations,
    Propose,
    Release,
    Return,
    Score,
    Select,
    Source,
)
from dendrite.dsl.states import Signature, common_state, signature_of
from dendrite.dsl.strategies.base import ProgramFacts, Strategy
from dendrite.dsl.types import OnError, as_finite, is_prompt
from dendrite.engine.arguments import is_whole, shortened
from dendrite.engine.constraints import Constraint, constraint_of
from dendrite.engine.errors import ConstraintError, ProgramError


class Part(NamedTuple):
    """One part of a program: its record, and its function unless it is a part by itself."""

    mark: AnyMark
    function: Function | None
    signature: Signature | None

    @property
    def place(self) -> str:
        """How messages name it."""
        if self.function is not None:
            return self.function.place
        return (
            f"{self.mark}(...) ({self.mark.line})" if isinstance(self.mark, ExpandMark | PruneMark) else str(self.mark)
        )


@dataclass(frozen=True, slots=True)
class Lowered:
    """A checked program."""

    operations: Operations
    state: object
    """The type of its state; `object` where no function says."""


def lower(
    parts: Sequence[object],
    strategy: Strategy,
    *,
    on_error: OnError,
    merge: Callable[..., Hashable] | None = None,
    names: Mapping[str, object],
) -> Lowered:
    """Check a program and turn it into operations.

    Args:
        parts: what the user gave to `compile`.
        strategy: drives the loop.
        on_error: checked here, used by the run.
        merge: gives nodes the keys that tell equal ones.
        names: local names of the caller, for annotations of local classes.

    Raises:
        ProgramError: anything that could not run; says what and where.
    """
    if on_error not in ("raise", "drop"):
        raise ProgramError(f'on_error={on_error!r}: give "raise" or "drop"')
    if not isinstance(strategy, Strategy):
        raise ProgramError(f"strategy={strategy!r} is no strategy: give one such as dd.Beam(depth=3)")
    collected = [_collected(part, names) for part in parts]
    expands = [part for part in collected if isinstance(part.mark, ExpandMark)]
    if not expands:
        raise ProgramError('the program has no @expand: decorate a function with it, or add dd.expand(cue="\\nStep:")')
    observe = _at_most_one(collected, ObserveMark)
    scores = [_score(part) for part in collected if isinstance(part.mark, ScoreMark)]
    select = _select(_at_most_one(collected, PruneMark))
    signed = [(part.function, part.signature) for part in collected if part.function and part.signature]
    key, vote = _helper("merge", merge), _helper("vote", strategy.vote)
    helpers = [(helper, signature_of(helper, names)) for helper in (*_conditions(expands), key, vote) if helper]
    state = common_state([*signed, *helpers])
    facts = ProgramFacts(
        has_score=bool(scores),
        has_observe=observe is not None,
        has_selector=select.function is not None,
        keep=select.keep,
    )
    strategy.check(facts)
    body: list[Expansion] = [Propose(tuple(_source(part) for part in expands)), Append(), Fork(), Generate()]
    body += [_observe(observe)] if observe else []
    body += [Merge(key)] if key else []
    body += scores
    return Lowered((Open(), Loop(strategy, tuple(body), select, Release(), vote), Return()), state)


def _collected(part: object, names: Mapping[str, object]) -> Part:
    if isinstance(part, AnyMark):
        if isinstance(part, ObserveMark | ScoreMark):
            raise ProgramError(f"dd.{part}(...) is no part by itself: decorate a function with it")
        return Part(part, None, None)
    mark = mark_of(part)
    if mark is None or not callable(part):
        raise ProgramError(f"{_described(part)} is no part of a program: {_hint(part)}")
    function = Function.of(part)
    if isinstance(mark, ExpandMark) and mark.cue is not None:
        raise ProgramError(f"{function.place} gives the cue, and so does expand(cue={mark.cue!r}): keep one of them")
    signature = signature_of(function, names)
    wants_many = {PruneMark: True, ScoreMark: None}.get(type(mark), False)
    if wants_many is not None and signature.takes_many is not None and signature.takes_many != wants_many:
        wanted = "a Sequence[Node]" if wants_many else "one Node"
        raise ProgramError(f"{function.place} is marked @{mark}, which takes {wanted}: change its parameter")
    return Part(mark, function, signature)


def _described(part: object) -> str:
    return Function.of(part).place if callable(part) and not isinstance(part, type) else repr(part)


def _hint(part: object) -> str:
    if isinstance(part, Strategy):
        return f"pass it as strategy={part}"
    return "decorate it with @dd.expand, @dd.observe, @dd.score or @dd.prune" if callable(part) else "give functions"


def _at_most_one(parts: Sequence[Part], kind: type[AnyMark]) -> Part | None:
    found = [part for part in parts if isinstance(part.mark, kind)]
    if len(found) > 1:
        places = " and ".join(part.place for part in found)
        raise ProgramError(f"a program has one @{found[0].mark}, this one has {len(found)}: {places}; join them")
    return found[0] if found else None


def _conditions(expands: Sequence[Part]) -> list[Function]:
    """The `when=` functions, which take nodes too."""
    marks = [part.mark for part in expands if isinstance(part.mark, ExpandMark)]
    return [function for mark in marks if (function := _helper("when", mark.when))]


def _helper(name: str, call: object) -> Function | None:
    if call is None:
        return None
    if not callable(call) or isinstance(call, type):
        raise ProgramError(f"{name}={shortened(call)} is no function: give one that takes a node, or leave it out")
    return Function.of(call)


def _source(part: Part) -> Source:
    mark = part.mark
    assert isinstance(mark, ExpandMark), "sources are made of expands"
    stop = _stops(part, mark.stop)
    _check_whole(part, "width", mark.width)
    _check_whole(part, "max_tokens", mark.max_tokens)
    temperature, prior = as_finite(mark.temperature), as_finite(mark.prior)
    if temperature is None or temperature < 0:
        raise ProgramError(f"{part.place}: temperature={mark.temperature!r} cannot be used: give 0 (greedy) or more")
    if prior is None or prior <= 0:
        raise ProgramError(f"{part.place}: prior={mark.prior!r} cannot be used: give a number above 0")
    if mark.cue is not None and not is_prompt(mark.cue):
        raise ProgramError(f"{part.place}: cue={mark.cue!r} is neither text nor chat messages")
    return Source(
        cue=mark.cue or "",
        function=part.function,
        when=_helper("when", mark.when),
        width=mark.width,
        sampling=Sampling(
            max_tokens=mark.max_tokens,
            stop=stop,
            temperature=temperature,
            constraint=_constraint(part, mark),
        ),
        prior=prior,
    )


def _stops(part: Part, stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(one, str) for one in stops):
        raise ProgramError(f"{part.place}: stop={shortened(stop)} cannot be used: give a string or a list of strings")
    if not all(stops):
        raise ProgramError(f"{part.place}: stop={stop!r} holds an empty string, which ends every text at once")
    return tuple(stops)


def _constraint(part: Part, mark: ExpandMark) -> Constraint | None:
    try:
        constraint = constraint_of(schema=mark.schema, regex=mark.regex, grammar=mark.grammar, choices=mark.choices)
        if constraint is not None:
            from dendrite.engine.grammars import check_grammar  # noqa: PLC0415 - most programs need no llguidance

            check_grammar(constraint)
    except ConstraintError as error:
        raise ProgramError(f"{part.place}: {error}") from error
    return constraint


def _observe(part: Part) -> Observe:
    assert part.function is not None, "an @observe has a function"
    assert isinstance(part.mark, ObserveMark), "made of an observe"
    if part.mark.concurrency is not None:
        _check_whole(part, "concurrency", part.mark.concurrency)
    return Observe(part.function, part.mark.concurrency)


def _score(part: Part) -> Score:
    mark, signature = part.mark, part.signature
    assert isinstance(mark, ScoreMark), "made of a score"
    assert part.function is not None, "a @score has a function"
    assert signature is not None, "every function was read"
    if mark.batch is not None:
        _check_whole(part, "batch", mark.batch)
        if signature.takes_many is False:
            raise ProgramError(f"{part.place}: batch= is for a function of a Sequence[Node], and this takes one Node")
    weight = as_finite(mark.weight)
    if weight is None:
        raise ProgramError(f"{part.place}: weight={mark.weight!r} cannot be used: give a finite number")
    takes_many = mark.batch is not None if signature.takes_many is None else signature.takes_many
    return Score(part.function, takes_many=takes_many, batch=mark.batch, weight=weight)


def _select(part: Part | None) -> Select:
    if part is None:
        return Select(None, None)
    assert isinstance(part.mark, PruneMark), "made of a prune"
    if part.mark.keep is not None:
        _check_whole(part, "keep", part.mark.keep)
    elif part.function is None:
        raise ProgramError(f"{part.place} keeps nothing: give keep=, or decorate a function")
    return Select(part.function, part.mark.keep)


def _check_whole(part: Part, name: str, value: object) -> None:
    if not is_whole(value) or value < 1:
        raise ProgramError(f"{part.place}: {name}={value!r} cannot be used: give a whole number, 1 or more")
