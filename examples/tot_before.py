"""Tree of Thoughts as LangGraph's tutorial builds it, for any chat model; `tot_after.py` differs in one line.

Candidates fan out with `Send`; each is continued by separate calls of the model. Scores are checked by code.
"""

import re
from typing import Annotated, Any, TypedDict

from langchain_core.messages import HumanMessage
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from dendrite.integrations.langchain import ChatDendrite

WIDTH, KEEP, DEPTH = 5, 3, 3
GUIDE = """Combine the numbers with + - * / to reach 24. Write one step a line, with what is left.
Numbers: 4 4 6 8. Steps: 4 + 8 = 12 (left: 4 6 12). 6 - 4 = 2 (left: 2 12). 2 * 12 = 24 (left: 24). Done.
Numbers: 2 9 10 12. Steps: 12 * 2 = 24 (left: 9 10 24). 10 - 9 = 1 (left: 1 24). 24 * 1 = 24 (left: 24). Done.
Numbers: 4 9 10 13. Steps: 13 - 10 = 3 (left: 3 4 9). 9 - 3 = 6 (left: 4 6). 4 * 6 = 24 (left: 24). Done.
Numbers: 1 4 8 8. Steps: 8 / 4 = 2 (left: 1 2 8). 1 + 2 = 3 (left: 3 8). 3 * 8 = 24 (left: 24). Done.
Numbers: 5 5 5 9. Steps: 5 + 5 = 10 (left: 5 9 10). 10 + 5 = 15 (left: 9 15). 15 + 9 = 24 (left: 24). Done.
"""


def gathered(before: list[str], new: list[str] | None) -> list[str]:
    """Collect what the fanned-out nodes add; None empties the list for the next round."""
    return [] if new is None else before + new


class State(TypedDict, total=False):
    numbers: str
    seed: str
    candidates: Annotated[list[str], gathered]
    kept: list[str]
    depth: int


def build(llm: ChatDendrite) -> Any:
    """Build the graph: expand, then prune, and expand what was kept until the depth is reached."""

    def expand(state: State) -> State:
        steps = state.get("seed", "")
        question = HumanMessage(f"{GUIDE}Numbers: {state['numbers']}. Steps:{steps}")
        replies = [llm.invoke([question]) for _ in range(WIDTH)]
        return {"candidates": [f"{steps} {reply.text.strip()}" for reply in replies]}

    def prune(state: State) -> Any:
        ranked = sorted(state["candidates"], key=distance)
        return {"kept": ranked[:KEEP], "depth": state.get("depth", 0) + 1, "candidates": None}

    def onward(state: State) -> Any:
        if state["depth"] == DEPTH:
            return END
        return [Send("expand", {"numbers": state["numbers"], "seed": kept}) for kept in state["kept"]]

    builder = StateGraph(State)
    builder.add_node("expand", expand)
    builder.add_node("prune", prune)
    builder.add_edge(START, "expand")
    builder.add_edge("expand", "prune")
    builder.add_conditional_edges("prune", onward, ["expand", END])
    return builder.compile()


def distance(steps: str) -> float:
    """How far the last number that was reached is from 24."""
    reached = re.findall(r"= (\d+)", steps)
    return abs(24 - int(reached[-1])) if reached else float("inf")


if __name__ == "__main__":
    with ChatDendrite(temperature=0.8, max_tokens=24) as llm:
        print(build(llm).invoke({"numbers": "4 5 6 10"})["kept"][0])
