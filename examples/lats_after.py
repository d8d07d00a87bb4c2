"""Language Agent Tree Search over forks: `lats_before.py`, but for the two lines in `expand` that call the model.

A tree of answers: the most promising one is revised in several ways, each revision is graded, grades flow up the tree.
"""

import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

from langchain_core.messages import BaseMessage, HumanMessage
from langgraph.graph import END, START, StateGraph

from dendrite.integrations.langchain import ChatDendrite

WIDTH, ROUNDS = 5, 3
TASK = "Write one short sentence that sells a green bicycle to a busy student."
REVISE = HumanMessage("Write it again, better: shorter, and more concrete. Give the sentence alone.")


@dataclass(eq=False)
class Node:
    """An answer, the conversation up to it, and what is known of its worth."""

    messages: list[BaseMessage]
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    value: float = 0.0
    visits: int = 0

    def uct(self) -> float:
        """Mean grade, and a bonus for what was seldom tried (Kocsis and Szepesvari, 2006)."""
        parent_visits = self.parent.visits if self.parent else self.visits
        return self.value / self.visits + math.sqrt(math.log(parent_visits + 1) / self.visits)


class State(TypedDict, total=False):
    root: Node
    rounds: int


def build(llm: ChatDendrite) -> Any:
    """Build the graph: expand the best leaf, until the rounds are over."""

    def expand(state: State) -> State:
        root = state.get("root") or Node([HumanMessage(TASK)])
        leaf = root
        while leaf.children:
            leaf = max(leaf.children, key=Node.uct)
        asked = [*leaf.messages, REVISE] if leaf.parent else leaf.messages
        replies = llm.batch([asked] * WIDTH)
        grading = [[HumanMessage(f"Rate this from 0 to 9, as a digit: {reply.text}")] for reply in replies]
        grades = llm.batch(grading, max_tokens=2)
        for reply, grade in zip(replies, grades, strict=True):
            child = Node([*asked, reply], leaf)
            leaf.children.append(child)
            back_up(child, float(next(filter(str.isdigit, grade.text), 0)))
        return {"root": root, "rounds": state.get("rounds", 0) + 1}

    builder = StateGraph(State)
    builder.add_node("expand", expand)
    builder.add_edge(START, "expand")
    builder.add_conditional_edges("expand", lambda state: END if state["rounds"] == ROUNDS else "expand")
    return builder.compile()


def back_up(node: Node | None, grade: float) -> None:
    """Tell the grade to all above."""
    while node is not None:
        node.visits, node.value, node = node.visits + 1, node.value + grade, node.parent


def answers(node: Node) -> list[Node]:
    return [found for child in node.children for found in (child, *answers(child))]


if __name__ == "__main__":
    with ChatDendrite(temperature=0.8, max_tokens=24) as llm:
        best = max(answers(build(llm).invoke({})["root"]), key=lambda node: node.value / node.visits)
        print(best.messages[-1].text)
