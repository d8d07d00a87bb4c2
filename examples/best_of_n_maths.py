"""Self-consistency (Wang et al., 2023): many answers to one question, which share its prompt; the majority wins.

python examples/best_of_n_maths.py "What is 17 plus 25?"
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import dendrite as dd

SHOTS = """What is 12 plus 30?
12 + 30 = 42. The answer is 42.

What is 9 times 8?
9 * 8 = 72. The answer is 72.

What is 50 minus 13?
50 - 13 = 37. The answer is 37.

"""


@dd.expand(width=1, max_tokens=40, temperature=0.8, stop="\n")
def work(node: dd.Node) -> str:
    return "\n"


def answer(node: dd.Node) -> str | None:
    """What a path votes for: its last number; a path without one abstains."""
    numbers = re.findall(r"-?\d+", node.text)
    return numbers[-1] if numbers else None


program = dd.compile(work, strategy=dd.BestOfN(16, vote=answer))


def ask(engine: dd.Engine, question: str, seed: int = 0) -> tuple[str | None, Counter[str | None], dd.Usage]:
    """The majority's answer, how many voted for what, and what it took."""
    with engine.root(SHOTS + question) as prompt, program.run(prompt, seed=seed) as result:
        votes = Counter(answer(node) for node in result.tree if node.parent is not None)
        return answer(result.best), votes, result.usage


if __name__ == "__main__":
    with dd.Engine.load("smollm2-135m-instruct") as loaded:
        said, counted, used = ask(loaded, " ".join(sys.argv[1:]) or "What is 17 plus 25?")
        print(said, dict(counted.most_common()))
        print(f"{used.tokens_computed} tokens computed, {used.tokens_logical} without a shared prompt")
