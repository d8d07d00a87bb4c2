"""Which state the functions of a program take, by their annotations, and whether they go together.

The type checker refuses mixed states where it can; `dd.compile` does so always.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dendrite.dsl.functions import Function, plain
from dendrite.dsl.node import Node
from dendrite.dsl.records import Child, Outcome
from dendrite.engine.errors import ProgramError

_SEQUENCES = (collections.abc.Sequence, list, tuple)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function's annotations say."""

    state: object
    """The `S` of its `Node[S]`; `object` where it does not say."""
    takes_many: bool | None
    """Whether it takes a sequence of nodes; None where it does not say."""
    makes: tuple[object, ...]
    """The `S` of each `Outcome[S]` and `Child[S]` that it returns."""


def signature_of(function: Function, names: Mapping[str, object]) -> Signature:
    """Read a function's annotations.

    Args:
        function: what the user decorated.
        names: what local classes in annotations are looked up in, beside the function's module.

    Raises:
        ProgramError: it does not take exactly one argument.
    """
    parameters = _parameters(function)
    hints = _hints(function.call, names)
    hint = hints.get(parameters[0].name, object)
    makes = tuple(_made_states(hints.get("return", object)))
    if _state_in(hint, Node) is not None:
        return Signature(_state_in(hint, Node), takes_many=False, makes=makes)
    if typing.get_origin(hint) in _SEQUENCES:
        inner = next(iter(typing.get_args(hint)), object)
        return Signature(_state_in(inner, Node) or object, takes_many=True, makes=makes)
    return Signature(object, takes_many=None, makes=makes)


def common_state(signatures: Sequence[tuple[Function, Signature]]) -> object:
    """The state type that fits every function.

    Raises:
        ProgramError: two functions take states that do not go together, or one makes a state that others do not take;
            names them and where they stand.
    """
    typed = [(function, signature.state) for function, signature in signatures if signature.state is not object]
    common = next((state for _, state in typed if all(fits(state, other) for _, other in typed)), None)
    if common is None:
        _refuse_mixed(typed)
        return object
    for maker, signature in signatures:
        for made in signature.makes:
            taker = next((function for function, state in typed if not fits(made, state)), None)
            if taker is not None:
                raise ProgramError(
                    f"one program, one state: {maker.place} makes {_name(made)}, which {taker.place} does not take"
                )
    return common


def _refuse_mixed(typed: Sequence[tuple[Function, object]]) -> None:
    for index, (function, state) in enumerate(typed):
        for other, other_state in typed[:index]:
            if not fits(state, other_state) and not fits(other_state, state):
                raise ProgramError(
                    f"one program, one state: {other.place} takes Node[{_name(other_state)}] and {function.place} "
                    f"takes Node[{_name(state)}]; give both the same state, or leave one a plain dd.Node"
                )


def fits(state: object, wanted: object) -> bool:
    """Whether a function for `wanted` can be given a `state`; true where that cannot be told."""
    if state == wanted or wanted in (object, typing.Any) or state is typing.Any:
        return True
    if _is_union(state):
        return all(fits(member, wanted) for member in typing.get_args(state))
    if _is_union(wanted):
        return any(fits(state, member) for member in typing.get_args(wanted))
    state, wanted = typing.get_origin(state) or state, typing.get_origin(wanted) or wanted
    if isinstance(state, type) and isinstance(wanted, type):
        try:
            return issubclass(state, wanted)
        except TypeError:  # protocols and typed dicts do not say
            return True
    return True


def _parameters(function: Function) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function.call).parameters.values())
    except ValueError:  # a builtin that does not say
        return [inspect.Parameter("node", inspect.Parameter.POSITIONAL_ONLY)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_one = parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY
    if not takes_one or len(required) > 1:
        hint = "; pass a bound method such as solver.move" if required and required[0].name == "self" else ""
        raise ProgramError(
            f"{function.place} takes ({', '.join(p.name for p in parameters)}); it is called with one argument, "
            f"the node or the nodes{hint}"
        )
    return parameters


def _hints(call: Callable[..., object], names: Mapping[str, object]) -> Mapping[str, object]:
    try:
        return typing.get_type_hints(plain(call), localns=dict(names))
    except (NameError, TypeError, AttributeError):  # names that only a type checker knows: nothing can be said
        return {}


def _state_in(hint: object, generic: type) -> object | None:
    """The `S` of `generic[S]`; None where the hint is something else."""
    if hint is generic:
        return object
    if typing.get_origin(hint) is not generic:
        return None
    state: object = typing.get_args(hint)[0]
    return object if isinstance(state, typing.TypeVar) else state


def _made_states(hint: object) -> Iterator[object]:
    for member in typing.get_args(hint) if _is_union(hint) else (hint,):
        if typing.get_origin(member) in _SEQUENCES:
            yield from _made_states(next(iter(typing.get_args(member)), object))
        for generic in (Outcome, Child):
            state = _state_in(member, generic)
            if state is not None and state is not object:
                yield state


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _name(state: object) -> str:
    return state.__qualname__ if isinstance(state, type) else str(state)
