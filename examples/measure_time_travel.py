"""Time going back to a checkpoint 2,000 tokens deep: `python examples/measure_time_travel.py [rounds] [model]`.

The same graph goes on from an old checkpoint to its first new token: once the checkpoint holds K/V, once tokens alone.
The cache of prefixes is emptied before each, so that the checkpoint is all there is.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

import dendrite as dd
from dendrite.integrations.langgraph import TimeTravelSaver, fork_node, generate_node

NUM_TOKENS = 2000


class State(TypedDict, total=False):
    branches: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Replay:
    seconds: float
    num_computed: int


def replays(engine: dd.Engine, saver: TimeTravelSaver, num_rounds: int, num_tokens: int = NUM_TOKENS) -> list[Replay]:
    """Run a graph once, then go back to the checkpoint before its last node again and again."""
    builder = StateGraph(State)
    text = prompt(engine, num_tokens)
    builder.add_node("fork", fork_node(1, engine=engine, prompt=lambda _: text))
    builder.add_node("generate", generate_node(engine=engine, max_tokens=1))
    builder.add_edge(START, "fork")
    builder.add_edge("fork", "generate")
    graph: Any = builder.compile(checkpointer=saver)
    thread = {"configurable": {"thread_id": "1"}}
    graph.invoke({}, thread)
    old = next(saved for saved in graph.get_state_history(thread) if saved.next == ("generate",))
    found = []
    for _ in range(num_rounds + 1):  # the first one warms up
        engine.clear_cache()
        before, began = engine.stats().tokens_computed, time.perf_counter()
        graph.invoke(None, old.config)
        found.append(Replay(time.perf_counter() - began, engine.stats().tokens_computed - before))
    saver.delete_thread("1")
    return found[1:]


def prompt(engine: dd.Engine, num_tokens: int) -> str:
    """A user's turn of about so many tokens."""
    words = "".join(f" {index}" for index in range(num_tokens))
    return engine.tokenizer.decode(engine.tokenizer.encode(words)[: num_tokens - 16])


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with dd.Engine.load(sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m-instruct") as loaded:
        medians = []
        for title, held_on in (("K/V held", loaded), ("tokens alone", None)):
            runs = replays(loaded, TimeTravelSaver(InMemorySaver(), held_on), rounds)
            medians.append(statistics.median(run.seconds for run in runs))
            print(
                f"{title}: {1000 * medians[-1]:.1f} ms to the first new token, {runs[-1].num_computed} tokens computed"
            )
        print(f"{medians[1] / medians[0]:.0f} times faster")
