"""The demo's search, as a user would write it: what a step continues, what code checks, how good it is, who goes on."""

from __future__ import annotations

from statistics import mean

import dendrite as dd
from dendrite.demo.examples import cue
from dendrite.demo.task import Poem, fault

TEMPERATURE = 0.9
MAX_TOKENS = 24
"""Most tokens of a line: more than the words it may have."""


def search(word: str, *, width: int, keep: int) -> dd.Program[Poem]:
    """A beam search for a poem on `word`: `width` tries at the next line of each of the `keep` best beginnings.

    The empty beginning gets as many tries as all `keep` together get later.
    """

    @dd.expand(
        width=width * keep, stop="\n", temperature=TEMPERATURE, max_tokens=MAX_TOKENS, when=lambda node: node.depth == 0
    )
    def first_line(node: dd.Node[Poem]) -> str:
        return line_cue(node.state)

    @dd.expand(width=width, stop="\n", temperature=TEMPERATURE, max_tokens=MAX_TOKENS, when=lambda node: node.depth > 0)
    def next_line(node: dd.Node[Poem]) -> str:
        return line_cue(node.state)

    return dd.compile(first_line, next_line, check, fluency, dd.prune(keep=keep), strategy=dd.Beam(depth=len(word)))


def line_cue(poem: Poem) -> str:
    """What the model is given before the next line; sampling is given the same."""
    return ("\n" if poem.lines else "") + cue(poem.letter)


@dd.observe
def check(node: dd.Node[Poem]) -> dd.Outcome[Poem]:
    """Code has the last word: a line that breaks a rule is dropped with all that would have followed."""
    line = node.text.strip()
    if reason := fault(line, node.state):
        raise dd.Reject(reason)
    poem = node.state.add(line)
    return dd.Outcome(poem, terminal=poem.is_complete)


@dd.score
def fluency(node: dd.Node[Poem]) -> float:
    """How likely the model finds the poem: the mean over its lines of the mean log-probability of their tokens."""
    logprobs = node.branch.logprobs
    own = mean(logprobs) if logprobs else 0.0
    before = node.parent.value if node.parent is not None and node.parent.value is not None else 0.0
    return before + (own - before) / node.depth
