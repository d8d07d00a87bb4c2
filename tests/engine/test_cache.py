"""Prefixes that nobody holds: found again, evicted in order, never in anybody's way."""

from __future__ import annotations

import threading
import time

from dendrite.engine.engine import Engine
from dendrite.testing import scripted_engine
from tests.engine.test_tree import compute, make_tree

SYSTEM = "you are a careful planner. "


def reply(text: str) -> str:
    return " so be it and so on and on" if text.endswith("go") else " yes"


def ask(engine: Engine, prompt: str, *, max_tokens: int = 4) -> str:
    with engine.root(prompt) as root:
        return root.generate(max_tokens=max_tokens).text


def test_a_pruned_prompt_is_not_computed_again() -> None:
    """The second call computes what it appends; the counters say what was found."""
    with scripted_engine(reply) as engine:
        first = ask(engine, SYSTEM + "go")
        before = engine.stats()
        assert before.blocks_used == 0 < before.blocks_cached
        assert ask(engine, SYSTEM + "go") == first
        after = engine.stats()
        assert after.cache_hits == before.cache_hits + 1
        # four tokens: the first is drawn from the row that was kept, the last one needs no slot
        assert after.tokens_computed - before.tokens_computed == 3
        assert after.cache_hit_tokens - before.cache_hit_tokens == len(SYSTEM + "go") + 1
        engine.check_integrity()


def test_a_conversation_goes_on_where_it_ended() -> None:
    """What was generated is part of the next prompt, and is found too; so are the tokens before a differing end."""
    with scripted_engine(reply) as engine:
        with engine.root(SYSTEM + "go") as root:
            root.generate(max_tokens=20)
            path = root.token_ids
        before = engine.stats()
        with engine.root(token_ids=[*path, 65, 66]) as later:
            later.generate(max_tokens=1)
        assert engine.stats().cache_hit_tokens - before.cache_hit_tokens == len(path) - 1
        with engine.root(SYSTEM + "stop"):
            assert engine.stats().cache_hit_tokens - before.cache_hit_tokens >= len(path) + len(SYSTEM)


def test_a_tail_stays_cached_while_another_branch_holds_the_prefix() -> None:
    """Two users of one system prompt: what the first one asked is found again although the second is still there."""
    with scripted_engine(reply) as engine:
        first = engine.root(SYSTEM + "one two three go")
        first.generate(max_tokens=4)
        second = engine.root(SYSTEM + "another go")
        second.generate(max_tokens=4)
        first.prune()
        engine.check_integrity()
        before = engine.stats()
        with engine.root(SYSTEM + "one two three go") as again:
            again.generate(max_tokens=1)
            assert engine.stats().tokens_computed - before.tokens_computed <= 1
        assert second.generate(max_tokens=4).text == "be i"
        engine.check_integrity()


def test_the_least_recently_used_prefix_goes_first() -> None:
    """Three prompts in a pool for two and a half: the one that was used last survives."""
    tree = make_tree(num_blocks=10, block_size=4)
    prompts = [[number] * 16 for number in (1, 2)]
    for prompt in [*prompts, prompts[0]]:
        tip, _ = tree.new_root(prompt)
        compute(tree, tip)
        tree.prune(tip)
    tip, shared = tree.new_root([3] * 16)
    compute(tree, tip)
    assert shared == 0
    tree.check_integrity()
    assert tree.new_root(prompts[1])[1] == 0
    assert tree.new_root(prompts[0])[1] == 16
    tree.check_integrity()


def test_a_search_fills_the_pool_with_cached_branches_and_never_runs_out() -> None:
    """Every block is cached in the end, and every call still finds what it needs."""
    with scripted_engine(reply, num_blocks=40) as engine:
        for number in range(30):
            with engine.root(f"question {number} go") as root:
                branches = root.fork(3)
                outs = engine.generate(branches, max_tokens=8)
                assert {out.text for out in outs} == {" so be i"}
                for branch in branches:
                    branch.prune()
            engine.check_integrity()
        stats = engine.stats()
        assert stats.blocks_used == 0
        assert stats.cache_evictions > 0


def test_the_siblings_of_a_score_are_not_cached() -> None:
    """A score leaves what its branch had, and nothing of its candidates."""
    with scripted_engine(reply) as engine, engine.root("is it good") as root:
        root.score([" yes", " no and then some more"])
        assert engine.stats().blocks_cached == 0


def test_a_branch_that_goes_on_evicts_what_was_cached_behind_it() -> None:
    """The cached child lies in the very slots that its parent writes next: it goes, rather than be found with them."""
    tree = make_tree(block_size=8)
    parent, _ = tree.new_root([1, 2, 3])
    compute(tree, parent)
    child = tree.fork(parent)
    tree.extend(child, [4, 5])
    compute(tree, child)
    tree.prune(child)
    assert len(tree.cache) == 1
    tree.extend(parent, [6])
    assert compute(tree, parent) == []
    assert len(tree.cache) == 0
    tree.check_integrity()


def test_a_new_root_leaves_running_branches_the_blocks_they_count_on() -> None:
    """While a generation may need all that is available, a root begins anew rather than on a cached prefix."""
    gate = threading.Event()

    def script(text: str) -> str:
        if "run" in text:
            gate.wait()
            return "x" * 4000
        return " yes"

    with scripted_engine(script, num_blocks=24) as engine:
        ask(engine, "cached " * 5)
        with engine.root("run") as busy:
            room = (24 - 1) * 4 - busy.num_tokens
            thread = threading.Thread(target=busy.generate, kwargs={"max_tokens": room})
            thread.start()
            while busy.status != "running":
                time.sleep(0.001)
            with engine.root("cached " * 5):
                hits = engine.stats().cache_hits
            gate.set()
            thread.join()
            assert hits == 0
            assert busy.num_tokens == room + 4
        engine.check_integrity()
