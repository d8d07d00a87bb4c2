"""An agent with a tool, searched with LATS (Zhou et al., 2024): act, see what the tool says, learn from what failed.

The agent has to find a hidden number with a tool that compares. python examples/lats_tools.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import dendrite as dd

HIDDEN = 37
ACTION = r" (compare|answer) [1-9][0-9]?"


@dataclass(frozen=True)
class Known:
    low: int = 1
    high: int = 99
    answer: int | None = None


async def compare(number: int) -> str:
    """The tool."""
    return "right" if number == HIDDEN else "higher" if number < HIDDEN else "lower"


@dd.expand(width=4, max_tokens=8, temperature=1.0)
def act(node: dd.Node[Known]) -> dd.Gen:
    lessons = "".join(f"\nNote: {lesson}" for lesson in node.reflections)
    middle = (node.state.low + node.state.high) // 2
    hint = f"\nIt is between {node.state.low} and {node.state.high}, such as {middle}."
    return dd.Gen(f"{lessons}{hint}\nAction:", regex=ACTION)


@dd.observe(concurrency=4)
async def use_tool(node: dd.Node[Known]) -> dd.Outcome[Known]:
    verb, number = re.fullmatch(r" (\w+) (\d+)", node.text).groups()  # type: ignore[union-attr]  # the regex holds it
    said, guess, known = await compare(int(number)), int(number), node.state
    if not known.low <= guess <= known.high:
        raise dd.Reject("it is known not to be that")
    if verb == "answer" or said == "right":
        return dd.Outcome(Known(guess, guess, guess), terminal=True, goal=said == "right")
    low, high = (guess + 1, known.high) if said == "higher" else (known.low, guess - 1)
    return dd.Outcome(Known(low, high), append=f"\nTool: it is {said} than {guess}.")


@dd.score
def narrowed(node: dd.Node[Known]) -> float:
    """How much is ruled out; a wrong answer is worth nothing."""
    known = node.state
    wrong = known.answer is not None and known.answer != HIDDEN
    return 0.0 if wrong else 1.0 - (known.high - known.low) / 98


lats = dd.LATS(40, reflect="\nThat answer was wrong. In one short sentence, what to do instead?\n", depth=8)
program = dd.compile(act, use_tool, narrowed, strategy=lats)

if __name__ == "__main__":
    task = "Find the hidden number from 1 to 99."
    with dd.Engine.load("smollm2-135m-instruct") as engine, program.run(engine, task, state=Known(), seed=1) as result:
        print(result.best.transcript)
        print(result.stopped, result.best.state)
