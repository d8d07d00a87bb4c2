"""`explain()`: the operations as text, the same on every machine."""

import re
from collections.abc import Sequence

import dendrite as dd


@dd.expand(width=5, max_tokens=32, stop="\n")
def step(node: dd.Node) -> str:
    return "\nStep:"


def early(node: dd.Node) -> bool:
    return node.depth < 2


@dd.observe(concurrency=4)
async def use_tool(node: dd.Node) -> str:
    return node.text


@dd.score
def value(node: dd.Node) -> dd.Choice:
    return dd.Choice(["sure", "no"], "\nReaches 24?")


@dd.score(batch=16, weight=0.5)
async def reward(nodes: Sequence[dd.Node]) -> list[float]:
    return [1.0 for _ in nodes]


@dd.prune(keep=2)
def diverse(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
    return nodes


def explained(program: dd.Program) -> str:
    return re.sub(r"(\.py):\d+", r"\1:LINE", program.explain())


def test_a_small_program() -> None:
    """Ten operations, one line each."""
    program = dd.compile(dd.expand(cue="\nStep:", width=5), value, dd.prune(keep=3), strategy=dd.Beam(depth=3))
    assert (
        explained(program)
        == """\
open     the prompt as a user's turn, or a fork of the branch it is run on
loop     Beam(depth=3)
  propose  5 children after '\\nStep:'
  append   each cue once, on a fork of its node, constant ones tokenised once in a run
  fork     one branch a child: 6 forks a node, nothing copied
  generate in one batch, up to 256 tokens, temperature 1
           at most 1,280 new tokens a node; its path and the cue are shared by all of them
  score    value, test_explain.py:LINE
           asks: about 3 question + about 1 label tokens a child in one pass after its path, which is shared; \
nothing is kept
  select   keep the best 3 of the whole frontier
  release  prune the branches of all others
return   the best node: its path stays live, everything else is pruned"""
    )


def test_a_large_program() -> None:
    """Every option shows where it takes effect."""
    program = dd.compile(
        step,
        dd.expand(cue="\nAnswer:", when=early, stop=["\n", "."], temperature=0.0),
        use_tool,
        value,
        reward,
        diverse,
        strategy=dd.Beam(depth=4),
        on_error="drop",
    )
    assert (
        explained(program)
        == """\
open     the prompt as a user's turn, or a fork of the branch it is run on
loop     Beam(depth=4)
  propose  5 children after the cue of step, test_explain.py:LINE, dynamic
  propose  1 child after '\\nAnswer:', when early, test_explain.py:LINE
  append   each cue once, on a fork of its node, constant ones tokenised once in a run
  fork     one branch a child: 6 + 1 forks a node, nothing copied
  generate in one batch, up to 32 tokens, stop at '\\n', temperature 1; up to 256 tokens, stop at '\\n' or '.', \
temperature 0
           at most 416 new tokens a node; its path and the cue are shared by all of them
  observe  use_tool, test_explain.py:LINE, async, at most 4 at once
  score    value, test_explain.py:LINE
           asks: about 3 question + about 1 label tokens a child in one pass after its path, which is shared; \
nothing is kept
  score    reward, test_explain.py:LINE, async, times 0.5, 16 nodes a call
  select   what diverse, test_explain.py:LINE returns, the first 2
  release  prune the branches of all others
return   the best node: its path stays live, everything else is pruned
         nodes that a function fails on are dropped"""
    )


def test_lines_are_where_the_function_stands() -> None:
    """A reader can go there."""
    line = value.__code__.co_firstlineno
    assert f"value, test_explain.py:{line}" in dd.compile(step, value, strategy=dd.Beam(depth=1)).explain()


def test_questions_are_counted_as_far_as_the_source_says() -> None:
    """Constant ones by length, computed ones as dynamic, equal ones once; a number asks nothing."""

    @dd.score
    def again(node: dd.Node) -> dd.Choice:
        return dd.Choice({"yes, of course": 1.0, "no": 0.0}, "\nReaches 24?", normalize="sum")

    @dd.score
    def dynamic(node: dd.Node) -> dd.Choice | float:
        return dd.Choice(["yes", "no"], f"Is {node.depth} enough?", fresh=True) if node.depth else 0.0

    @dd.score
    def bare(node: dd.Node) -> dd.Choice:
        return dd.Choice(labels=list("ab"))

    @dd.score
    def number(node: dd.Node) -> float:
        return 1.0

    lines = explained(dd.compile(step, value, again, dynamic, bare, number, strategy=dd.Beam(depth=1))).splitlines()
    first, *others = [line.strip() for line in lines if line.startswith(" " * 11 + "asks")]
    assert first.startswith("asks: about 3 question + about 1 label tokens a child in one pass after its path")
    assert others == [
        "asks the same question again: about 3 label tokens a child in one pass, the question's are shared",
        "asks: a dynamic question's + about 0 label tokens a child in one pass on a root of its own; nothing is kept",
        "asks no question: its labels' tokens a child in one pass after its path, which is shared",
    ]
