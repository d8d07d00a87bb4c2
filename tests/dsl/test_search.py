"""Searches on the scripted engine: what they find, what they leave behind, and what they cost."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import dendrite as dd
from dendrite.testing import Reply, scripted_engine


@dataclass(frozen=True)
class Sum:
    total: int = 0


def digits(text: str) -> Reply:
    """Says a digit after "Step:", and whether a text has many nines when asked."""
    if text.endswith("Step:"):
        return [" 1\n", " 5\n", " 9\n"]
    if text.endswith("many?"):
        share = (1 + text.count("9")) / (2 + text.count("Step:"))
        return {" yes": share, " no": 1 - share} if share < 1 else " yes"
    return "I do not know."


@pytest.fixture
def engine() -> Iterator[dd.Engine]:
    with scripted_engine(digits) as engine:
        yield engine
        engine.check_integrity()


def assert_nothing_left(engine: dd.Engine, *, branches: int = 0) -> None:
    stats = engine.stats()
    assert stats.branches == branches
    if not branches:
        assert stats.blocks_used == 0


@dd.expand(width=6, stop="\n")
def step(node: dd.Node) -> str:
    return "\nStep:"


@dd.observe
def add(node: dd.Node[Sum]) -> dd.Outcome[Sum]:
    total = node.state.total + int(node.text)
    return dd.Outcome(Sum(total), goal=total == 23, terminal=total > 23)


@dd.score
def closeness(node: dd.Node[Sum]) -> float:
    return -abs(23.0 - node.state.total)


@dd.score
def nines(node: dd.Node) -> dd.Choice:
    return dd.Choice(["yes", "no"], "\nmany?", normalize="sum")


summing = dd.compile(step, add, closeness, dd.prune(keep=3), strategy=dd.Beam(depth=8))


LOOSE: Any = summing  # for what the type checker would refuse


def test_a_goal_ends_the_search(engine: dd.Engine) -> None:
    """The best node is the goal, its path adds up, and its branch says what its transcript says."""
    with summing.run(engine, "Reach 23.", state=Sum(), seed=1) as result:
        assert result.stopped == "goal"
        assert result.best.state == Sum(23)
        assert result.best.status == "goal"
        assert sum(int(node.text) for node in result.best.path[1:]) == 23
        steps = "".join(f"\nStep:{node.text}" for node in result.best.path[1:])
        assert result.best.transcript == "Reach 23." + steps
        assert result.best.branch.text.endswith("<|assistant|>" + steps)
        assert [node.depth for node in result.best.path] == list(range(len(result.best.path)))
        assert_nothing_left(engine, branches=len(result.best.path))
        more = result.best.branch.fork()
    assert more.text.endswith(steps)
    more.prune()
    assert_nothing_left(engine)
    assert result.best.text


def test_the_same_seed_gives_the_same_search(engine: dd.Engine) -> None:
    """Twice in one engine, whatever ran between; another seed or none differs."""
    program = dd.compile(step, nines, dd.prune(keep=2), strategy=dd.Beam(depth=4))
    trees = []
    for seed in (7, 8, 7, None, None):
        with program.run(engine, "Go.", seed=seed) as result:
            trees.append(result.tree.to_json())
    assert trees[0] == trees[2]
    assert len({*trees}) == 4


def test_a_choice_is_read_in_one_pass_and_leaves_nothing(engine: dd.Engine) -> None:
    """The value is the script's own probability, and no node's text has the question."""
    program = dd.compile(step, nines, strategy=dd.Beam(depth=2))
    with program.run(engine, "Go.", seed=3) as result:
        for node in list(result.tree)[1:]:
            assert node.value == pytest.approx((1 + node.transcript.count("9")) / (2 + node.depth), abs=1e-5)
            assert "many?" not in node.transcript
        assert "many?" not in result.best.branch.text
        assert result.best.value == max(node.value or 0 for node in result.tree)


def test_keep_counts_the_whole_frontier(engine: dd.Engine) -> None:
    """After a round, `keep` nodes live and the rest are pruned, whoever their parents are."""
    program = dd.compile(step, nines, dd.prune(keep=2), strategy=dd.Beam(depth=3))
    rounds = [event for event in program.stream(engine, "Go.") if event.kind == "round"]
    assert [len(event.nodes) for event in rounds] == [2, 2, 2]
    assert all(node.value is not None for event in rounds for node in event.nodes)


def test_own_children_are_appended_as_they_stand(engine: dd.Engine) -> None:
    """Their text and state are what the function gave; nothing is generated."""

    @dd.expand
    def moves(node: dd.Node[Sum]) -> list[dd.Child[Sum]]:
        return [dd.Child(f"\n+{n}", Sum(node.state.total + n)) for n in (1, 5, 9)]

    program = dd.compile(moves, closeness, dd.prune(keep=3), strategy=dd.Beam(depth=3))
    with program.run(engine, "Reach 23.", state=Sum()) as result:
        assert result.best.state == Sum(23)
        assert sorted(node.text for node in result.best.path[1:]) == ["\n+5", "\n+9", "\n+9"]
        assert result.best.branch.text.endswith(result.best.transcript.removeprefix("Reach 23."))
        assert result.usage.tokens_generated == 0


def test_several_expands_add_up_and_when_selects(engine: dd.Engine) -> None:
    """Children come in the order of the parts; a node that no part wants is a dead end."""

    def at_root(node: dd.Node) -> bool:
        return node.depth == 0

    program = dd.compile(
        dd.expand(cue="\nStep:", width=2, stop="\n", when=at_root),
        dd.expand(cue=" So:", max_tokens=4, temperature=0.0, when=at_root),
        nines,
        strategy=dd.Beam(depth=3),
    )
    with program.run(engine, "Go.", seed=1) as result:
        assert [node.transcript[:5] for node in list(result.tree)[1:]] == ["Go.\nS", "Go.\nS", "Go. S"]
        assert list(result.tree)[3].text == "I do"
        assert result.stopped == "done"
        assert result.best.depth == 1


def test_a_gen_sets_cue_and_length(engine: dd.Engine) -> None:
    """A function may return a `Gen`; its `max_tokens` goes before the decorator's."""

    @dd.expand(width=2, max_tokens=100)
    def short(node: dd.Node) -> dd.Gen:
        return dd.Gen(" So:", max_tokens=3)

    with dd.compile(short, nines, strategy=dd.Beam(depth=1)).run(engine, "Go.") as result:
        assert {node.text for node in list(result.tree)[1:]} == {"I d"}


def test_observe_appends_rejects_and_ends(engine: dd.Engine) -> None:
    """What it appends is in transcript and branch; what it rejects is dropped, with the reason in the event."""

    @dd.observe(concurrency=2)
    async def look(node: dd.Node) -> dd.Outcome[object]:
        if "1" in node.text:
            raise dd.Reject("ones are dull")
        return dd.Outcome(node.state, append=" (seen)", terminal="5" in node.text)

    program = dd.compile(step, look, nines, dd.prune(keep=2), strategy=dd.Beam(depth=2))
    events = list(program.stream(engine, "Go.", seed=5))
    result = events[-1].result
    assert result is not None
    rejected = [event for event in events if event.kind == "rejected"]
    assert rejected
    assert {event.detail for event in rejected} == {"ones are dull"}
    assert {event.node.status for event in rejected} == {"rejected"}
    for node in list(result.tree)[1:]:
        assert node.transcript.endswith(" (seen)") == (node.status != "rejected")
        if node.status == "terminal":
            assert not result.tree.children(node)
    assert result.best.branch.text.endswith(result.best.transcript.removeprefix("Go."))
    result.close()


def test_a_terminal_node_may_be_the_best(engine: dd.Engine) -> None:
    """It is expanded no more, but no deeper node beats its value."""

    @dd.observe
    def look(node: dd.Node) -> dd.Outcome[None]:
        return dd.Outcome(None, terminal="9" in node.text)

    @dd.score
    def rate(node: dd.Node) -> float:
        return 100.0 if node.status == "terminal" else node.depth

    program = dd.compile(step, look, rate, dd.prune(keep=1), strategy=dd.Beam(depth=3))
    with program.run(engine, "Go.", seed=2) as result:
        assert result.best.status == "terminal"
        assert result.best.branch.status == "idle"
        assert result.best in result.leaves


def test_a_program_function_chooses_the_survivors(engine: dd.Engine) -> None:
    """An async `@prune` without any score: what it returns goes on, best first."""

    @dd.prune
    async def last(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
        return [nodes[-1]]

    with dd.compile(step, last, strategy=dd.Beam(depth=3)).run(engine, "Go.") as result:
        assert [node.name for node in result.best.path] == ["root", "root/5", "root/5/5", "root/5/5/5"]


def test_when_nothing_survives_the_last_frontier_is_returned(engine: dd.Engine) -> None:
    """A `@prune` that returns nobody, or an `@observe` that rejects everybody, ends the search with what there was."""

    @dd.prune
    def nobody(nodes: Sequence[dd.Node]) -> Sequence[dd.Node]:
        return []

    @dd.observe
    def never(node: dd.Node) -> None:
        raise dd.Reject("no")

    with dd.compile(step, nines, nobody, strategy=dd.Beam(depth=3)).run(engine, "Go.") as result:
        assert result.best.depth == 1
        assert result.best.branch.status == "idle"
    with dd.compile(step, never, strategy=dd.Beam(depth=3)).run(engine, "Go.") as result:
        assert result.best.depth == 0
        assert result.stopped == "done"
    assert_nothing_left(engine)


def test_values_add_up_by_weight(engine: dd.Engine) -> None:
    """Several scores, single and batched, make one value; the branch has it too."""
    sizes: list[int] = []

    @dd.score(batch=4, weight=10)
    async def many(nodes: Sequence[dd.Node]) -> list[float]:
        sizes.append(len(nodes))
        return [float(node.text) for node in nodes]

    @dd.score
    def one(node: dd.Node) -> float:
        return 0.5

    with dd.compile(step, many, one, strategy=dd.Beam(depth=1)).run(engine, "Go.") as result:
        assert sizes == [4, 2]
        assert all(node.value == 10 * float(node.text) + 0.5 for node in list(result.tree)[1:])
        assert result.best.branch.value == result.best.value


def test_children_inherit_the_state(engine: dd.Engine) -> None:
    """Without `@observe` a child has its parent's state, the very object."""
    state = object()
    with dd.compile(step, nines, strategy=dd.Beam(depth=2)).run(engine, "Go.", state=state) as result:
        assert all(node.state is state for node in result.tree)


def test_message_level_expansion(engine: dd.Engine) -> None:
    """A cue of messages closes the assistant's turn and opens another; the transcript shows the roles."""

    @dd.expand(width=2, max_tokens=4)
    def turn(node: dd.Node) -> list[dd.Message]:
        return [{"role": "user", "content": "Next step only."}]

    program = dd.compile(turn, nines, dd.prune(keep=1), strategy=dd.Beam(depth=2))
    with program.run(engine, [{"role": "user", "content": "Plan."}]) as result:
        assert result.best.transcript == (
            "user: Plan.\nassistant: \nuser: Next step only.\nassistant: I do\nuser: Next step only.\nassistant: I do"
        )
        assert (
            result.best.branch.text
            == (
                "<|user|>Plan.<|end|><|assistant|>"
                "<|user|>Next step only.<|end|><|assistant|>I do<|end|>"
                "<|user|>Next step only.<|end|><|assistant|>I do"
            )
            or result.best.branch.text.count("<|user|>Next step only.<|end|><|assistant|>I do") == 2
        )


def test_a_search_continues_a_branch(engine: dd.Engine) -> None:
    """The user's branch stays as it is and alive; a seed makes the search repeatable there too."""
    with engine.root("Raw text.") as branch:
        before = branch.token_ids
        program = dd.compile(step, nines, dd.prune(keep=2), strategy=dd.Beam(depth=2))
        texts = []
        for _ in range(2):
            with program.run(branch, " More:", seed=4) as result:
                assert result.best.transcript.startswith("Raw text. More:\nStep:")
                assert result.best.branch.text == result.best.transcript
                texts.append(result.tree.to_json())
        assert texts[0] == texts[1]
        assert branch.token_ids == before
        assert_nothing_left(engine, branches=1)


def test_siblings_share_their_cue(engine: dd.Engine) -> None:
    """The cue of six children is computed once: far fewer tokens than as many separate requests."""
    with dd.compile(
        dd.expand(cue=" Think about this as long as you like. Step:", width=6, stop="\n"), nines, strategy=dd.Beam(1)
    ).run(engine, "A prompt of some length, which all share.") as result:
        usage = result.usage
    assert usage.tokens_generated == 6 * 2
    assert usage.tokens_logical > 4 * usage.tokens_computed
    assert usage.nodes == 6
    assert usage.forks >= 6
    assert usage.peak_kv_bytes > 0
    assert usage.seconds > 0


def test_a_pool_too_small_for_a_round_runs_it_in_parts() -> None:
    """Where all children at once might not fit, fewer run at a time, with the same result."""
    program = dd.compile(dd.expand(cue="\nStep:", width=6, stop="\n", max_tokens=40), nines, strategy=dd.Beam(depth=1))
    trees = []
    for num_blocks in (500, 40):
        with scripted_engine(digits, num_blocks=num_blocks) as engine, program.run(engine, "Go.", seed=1) as result:
            trees.append(result.tree.to_json())
    assert trees[0] == trees[1]


def test_a_forgotten_result_frees_its_blocks(engine: dd.Engine) -> None:
    """A result that nobody closed is let go of when it is collected."""
    result = dd.compile(step, nines, strategy=dd.Beam(depth=2)).run(engine, "Go.")
    assert engine.stats().branches == 3
    kept = result.best
    del result
    gc.collect()
    assert engine.stats().branches == 3
    assert kept.branch.text.endswith(kept.text)
    del kept
    gc.collect()
    assert_nothing_left(engine)


def test_the_tree_is_data(engine: dd.Engine) -> None:
    """Rows as plain values and JSON, parents first; the drawing marks the best path."""
    with summing.run(engine, "Reach 23.", state=Sum(), seed=1) as result:
        data = json.loads(result.tree.to_json())
        assert data["best"] == result.best.id
        assert len(data["nodes"]) == len(result.tree)
        for row in data["nodes"][1:]:
            assert row["parent"] < row["id"]
            assert row["depth"] == data["nodes"][row["parent"]]["depth"] + 1
        assert data["nodes"][result.best.id]["state"] == {"total": 23}
        lines = str(result.tree).splitlines()
        assert len(lines) == len(result.tree)
        assert sum("* " in line for line in lines) == result.best.depth
        assert lines[0] == "root"
        assert "[goal]" in str(result.tree)
        assert str(result.tree.__rich__()) == str(result.tree)


def test_leaves_stand_at_the_end_best_first(engine: dd.Engine) -> None:
    """The frontier, without what was pruned."""
    program = dd.compile(step, nines, dd.prune(keep=3), strategy=dd.Beam(depth=2))
    with program.run(engine, "Go.") as result:
        values = [node.value or 0 for node in result.leaves]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert result.leaves[0].value == result.best.value


@pytest.mark.parametrize(
    "run, complaint",
    [
        (lambda engine: summing.run(engine, "Go."), r"take Node\[Sum\], and none was given: pass state=Sum"),
        (lambda engine: LOOSE.run(engine, "Go.", state=3), "it was given a int"),
        (lambda engine: LOOSE.run(engine, 3, state=Sum()), "the prompt is 3"),
        (lambda engine: LOOSE.run("engine", "Go.", state=Sum()), "runs on an Engine or a Branch"),
        (lambda engine: summing.run(engine, "Go.", state=Sum(), budget=dd.Budget(tokens=0)), "allows nothing"),
        (lambda engine: summing.map(engine, [], concurrency=0), "1 or more"),
    ],
)
def test_runs_that_cannot_begin_are_refused(
    engine: dd.Engine, run: Callable[[dd.Engine], object], complaint: str
) -> None:
    """With what to do, and nothing made."""
    with pytest.raises(dd.ProgramError, match=complaint):
        run(engine)
    assert_nothing_left(engine)
    assert engine.stats().forks == 0


def test_appends_that_follow_each_other_are_computed_together(engine: dd.Engine) -> None:
    """What `@observe` appends and the next cue are one prefill: not a step more for each level, and each byte once."""

    def observed(seen: str, prompt: str) -> dd.Usage:
        @dd.observe
        def look(node: dd.Node) -> dd.Outcome[None]:
            return dd.Outcome(None, append=seen)

        one = dd.expand(cue="\nStep:", stop="\n", temperature=0.0)
        with dd.compile(one, look, strategy=dd.Beam(depth=3)).run(engine, prompt, seed=1) as result:
            assert result.best.depth == 3
            return result.usage

    def fewest(seen: str, names: str) -> dd.Usage:  # when the loop's thread wakes up costs a step more or less
        return min((observed(seen, f"{name}.") for name in names), key=lambda usage: usage.steps)

    without, with_one = fewest("", "abcdef"), fewest(" (seen)", "uvwxyz")
    assert with_one.steps - without.steps < 2  # there are two such appends
    more = with_one.tokens_computed - without.tokens_computed
    assert abs(more - 2 * len(" (seen)")) < 2  # what follows the last step is needed by nobody
