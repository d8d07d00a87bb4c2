"""For tests of programs: nodes to call decorated functions with, and an engine that says what a script tells it to.

    from dendrite.testing import node, scripted_engine

    def test_apply_finds_the_goal():
        assert apply(node("4 * 6 = 24", state=Game((4, 6)))).goal

    def test_the_search_finds_it():
        with scripted_engine(lambda text: [" 4 + 6 = 10", " 4 * 6 = 24"]) as engine:
            assert program.run(engine, "4 6", state=Game((4, 6))).stopped == "goal"

The scripted engine is a real one: scheduler, tree, sampler and text handling are those that run a model. Only what
computes the logits is replaced, and it reads the text from where the plan says that its K/V is.
"""

from dendrite.testing.nodes import node
from dendrite.testing.scripted import Reply, Script, scripted_engine

__all__ = ["Reply", "Script", "node", "scripted_engine"]
