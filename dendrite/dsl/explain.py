"""A program's operations as text."""

from __future__ import annotations

from collections.abc import Iterator

from dendrite.dsl.functions import Function
from dendrite.dsl.node import Sampling
from dendrite.dsl.operations import (
    Append,
    Expansion,
    Fork,
    Generate,
    Loop,
    Merge,
    Observe,
    Operations,
    Propose,
    Score,
    Select,
    Source,
)
from dendrite.dsl.questions import Asked, asked_by
from dendrite.dsl.types import OnError


def explained(operations: Operations, *, on_error: OnError) -> str:
    """One line an operation, indented as they nest; the same text on every machine."""
    _, loop, _ = operations
    lines = ["open     the prompt as a user's turn, or a fork of the branch it is run on", *_loop(loop)]
    lines.append("return   the best node: its path stays live, everything else is pruned")
    if on_error == "drop":
        lines.append("         nodes that a function fails on are dropped")
    return "\n".join(lines)


def _loop(loop: Loop) -> Iterator[str]:
    yield f"loop     {loop.strategy}"
    put: set[tuple[str, bool]] = set()
    for operation in loop.body:
        for line in _lines(operation, loop.sources):
            yield "  " + line
        for asked in asked_by(operation.function) if isinstance(operation, Score) else ():
            yield f"           {_question(asked, is_shared=(asked.question, asked.is_fresh) in put)}"
            if asked.question is not None:
                put.add((asked.question, asked.is_fresh))
    yield f"  select   {_selection(loop.select)}"
    yield "  release  prune the branches of all others"


def _lines(operation: Expansion, sources: tuple[Source, ...]) -> Iterator[str]:
    match operation:
        case Propose():
            for source in sources:
                yield f"propose  {_source(source)}"
        case Append():
            once = ", constant ones tokenised once in a run" if any(not source.function for source in sources) else ""
            yield f"append   each cue once, on a fork of its node{once}"
        case Fork():
            yield f"fork     one branch a child: {' + '.join(map(_forks, sources))} forks a node, nothing copied"
        case Generate():
            samplings = dict.fromkeys(source.sampling for source in sources)
            most = sum(source.width * source.sampling.max_tokens for source in sources)
            yield f"generate in one batch, {'; '.join(map(_sampling, samplings))}"
            yield f"         at most {most:,} new tokens a node; its path and the cue are shared by all of them"
        case Observe(function, concurrency):
            at_once = "" if concurrency is None else f", at most {concurrency} at once"
            yield f"observe  {_function(function)}{at_once}"
        case Merge(key):
            yield f"merge    nodes of one key, {_function(key)}: the first is kept"
        case Score(function, takes_many, batch, weight):
            how = "" if weight == 1 else f", times {weight:g}"
            if takes_many:
                how += ", all nodes in one call" if batch is None else f", {batch} nodes a call"
            yield f"score    {_function(function)}{how}"


def _question(asked: Asked, *, is_shared: bool) -> str:
    """What reading a choice costs for each child."""
    num_labels, num_question = asked.num_label_tokens, asked.num_question_tokens
    labels = "its labels'" if num_labels is None else f"about {num_labels} label"
    if is_shared:
        return f"asks the same question again: {labels} tokens a child in one pass, the question's are shared"
    where = "on a root of its own" if asked.is_fresh else "after its path, which is shared"
    if asked.question == "":
        return f"asks no question: {labels} tokens a child in one pass {where}"
    question = "a dynamic question's" if num_question is None else f"about {num_question} question"
    return f"asks: {question} + {labels} tokens a child in one pass {where}; nothing is kept"


def _forks(source: Source) -> str:
    return str(1 if source.width == 1 else source.width + 1)  # an only child goes on from its cue


def _source(source: Source) -> str:
    children = "1 child" if source.width == 1 else f"{source.width} children"
    if source.function is None:
        what = f"{children} after {source.cue!r}"
    else:
        what = f"{children} after the cue of {_function(source.function)}, dynamic"
    condition = "" if source.when is None else f", when {source.when.label}"
    return what + condition


def _function(function: Function) -> str:
    return f"{function.label}, async" if function.is_async else function.label


def _sampling(sampling: Sampling) -> str:
    stop = f", stop at {' or '.join(map(repr, sampling.stop))}" if sampling.stop else ""
    constraint = f", {sampling.constraint}" if sampling.constraint is not None else ""
    return f"up to {sampling.max_tokens} tokens{stop}{constraint}, temperature {sampling.temperature:g}"


def _selection(select: Select) -> str:
    kept = "all" if select.keep is None else f"the best {select.keep} of the whole frontier"
    if select.function is None:
        return f"keep {kept}"
    what = f"what {_function(select.function)} returns"
    return what if select.keep is None else f"{what}, the first {select.keep}"
