"""Time the two ports before and after, turn about on one engine: `python examples/measure_ports.py [rounds] [model]`.

Answers have a fixed length, since the end of text is forbidden: both sides sample as many tokens.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass

import dendrite as dd
from dendrite.integrations.langchain import ChatDendrite

PORTS = {"tot": {"numbers": "4 5 6 10"}, "lats": {}}


@dataclass(frozen=True)
class Run:
    seconds: float
    num_computed: int
    num_sampled: int


def run(engine: dd.Engine, name: str, values: dict[str, str]) -> Run:
    """One run of one graph from an empty cache."""
    never_ends = dict.fromkeys(engine.tokenizer.eos_token_ids, -100.0)
    llm = ChatDendrite(engine=engine, temperature=0.8, max_tokens=24, logit_bias=never_ends)
    graph = importlib.import_module(name).build(llm)
    engine.clear_cache()
    before, began = engine.stats(), time.perf_counter()
    graph.invoke(values)
    seconds, after = time.perf_counter() - began, engine.stats()
    computed = after.tokens_computed - before.tokens_computed
    return Run(seconds, computed, after.tokens_sampled - before.tokens_sampled)


def compare(engine: dd.Engine, port: str, num_rounds: int) -> dict[str, list[Run]]:
    """Both sides of a port, one after the other in each round; a first round that does not count warms up."""
    sides: dict[str, list[Run]] = {"before": [], "after": []}
    for _ in range(num_rounds + 1):
        for side, runs in sides.items():
            runs.append(run(engine, f"{port}_{side}", PORTS[port]))
    return {side: runs[1:] for side, runs in sides.items()}


def show(port: str, sides: dict[str, list[Run]]) -> None:
    """A row of the table for each side, and how many times faster the second is, round by round."""
    for side, runs in sides.items():
        last, seconds = runs[-1], " ".join(f"{run.seconds:.1f}" for run in runs)
        print(f"| {port}, {side} | {last.num_sampled} | {last.num_computed} | {seconds} |")
    ratios = [old.seconds / new.seconds for old, new in zip(sides["before"], sides["after"], strict=True)]
    shown = " ".join(f"{ratio:.1f}" for ratio in ratios)
    print(f"{port}: {statistics.median(ratios):.1f} times faster ({shown})", flush=True)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with dd.Engine.load(sys.argv[2] if len(sys.argv) > 2 else "smollm2-135m-instruct") as loaded:
        for each in PORTS:
            show(each, compare(loaded, each, rounds))
