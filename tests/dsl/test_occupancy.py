"""Batches stay full where there is work: rows of each step, counted at the runner, against what was unfinished then."""

from collections.abc import Iterator

import pytest
from torch import Tensor

import dendrite as dd
from dendrite.engine.batch import Batch
from dendrite.engine.config import EngineConfig
from dendrite.testing.runner import ScriptedRunner
from dendrite.testing.tokenizer import ByteTokenizer


class CountingRunner(ScriptedRunner):
    """Notes how many branches each step draws a token for."""

    def __init__(self) -> None:
        super().__init__(self._reply, num_blocks=4096, block_size=4, context_length=4096)
        self.drawn: list[int] = []

    @staticmethod
    def _reply(text: str) -> str:
        """Longer or shorter, by the path's last number."""
        number = text.rpartition("/")[2]
        return "x" * int(number) if number.isdigit() else "?"

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Count, then run."""
        self.drawn.append(len(batch.output_rows))
        return super().run(batch, drawn)


@pytest.fixture
def runner() -> CountingRunner:
    return CountingRunner()


@pytest.fixture
def engine(runner: CountingRunner) -> Iterator[dd.Engine]:
    with dd.Engine(runner, ByteTokenizer(), EngineConfig.of(block_size=4)) as engine:
        yield engine
        engine.check_integrity()


def lopsided(engine: dd.Engine) -> list[dd.Branch]:
    """A computed chain thirty deep, with a leaf at every node and a bush at every fifth, to be continued unevenly."""
    node, leaves = engine.root("Go"), []
    for depth in range(30):
        for twig in range(4 if depth % 5 == 0 else 1):
            (leaf,) = node.fork(1)
            leaves.append(leaf.append(f"/{1 + (7 * depth + 5 * twig) % 23}"))
        (node,) = node.fork(1)
        node.append("." * (depth % 3))
    node.score(["x"])  # as in a search, where steps were generated: the whole chain has its K/V
    return leaves


def test_every_unfinished_branch_of_a_lopsided_tree_is_in_every_step(engine: dd.Engine, runner: CountingRunner) -> None:
    """However deep and uneven the tree: no step leaves out a branch that has tokens to come."""
    leaves = lopsided(engine)
    outs = engine.generate(leaves, max_tokens=50, temperature=0.0)
    tokens = [len(out.text) + 1 for out in outs]  # the end of a text is drawn too
    assert max(tokens) - min(tokens) > 15
    assert runner.drawn[-max(tokens) :] == [sum(length > step for length in tokens) for step in range(max(tokens))]


def test_who_waits_joins_as_soon_as_somebody_ends(engine: dd.Engine, runner: CountingRunner) -> None:
    """Calls that come while others run share their steps: together they take no more steps than the longest alone."""
    leaves = lopsided(engine)
    before = len(runner.drawn)
    with engine.together():
        tickets = [engine.submit([leaf], max_tokens=50, temperature=0.0) for leaf in leaves]
    outs = [ticket.wait()[0] for ticket in tickets]
    longest = max(len(out.text) + 1 for out in outs)
    assert len(runner.drawn) - before == longest
