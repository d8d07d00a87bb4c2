import pytest

import dendrite as dd
from dendrite.demo.examples import prompt
from dendrite.demo.program import check, line_cue, search
from dendrite.demo.report import Found
from dendrite.demo.sampling import sample
from dendrite.demo.task import Poem
from dendrite.testing import node, scripted_engine
from tests.demo.script import BAD, GOOD, POEM, WORD, loses, wins


def found(script: object, *, seed: int = 1, width: int = 4, keep: int = 2) -> Found:
    with scripted_engine(script) as engine:  # type: ignore[arg-type]  # the two scripts below
        program = search(WORD, width=width, keep=keep)
        with program.run(engine, prompt(WORD), state=Poem(WORD), seed=seed) as result:
            outcome = Found.of(result)
        assert engine.stats().blocks_used == 0
        return outcome


def test_check_adds_a_good_line_to_the_poem() -> None:
    """The text of the node is taken without the space around it; the last line ends the path."""
    first = check(node(f" {GOOD[0]} ", state=Poem(WORD)))
    assert (first.state.lines, first.terminal) == (GOOD[:1], False)
    last = check(node(GOOD[1], state=first.state))
    assert (last.state, last.terminal) == (POEM, True)


def test_check_rejects_a_bad_line_with_the_rule_it_breaks() -> None:
    """The reason is what the watchers show."""
    with pytest.raises(dd.Reject, match="other letter"):
        check(node(BAD, state=Poem(WORD)))


def test_the_cue_names_the_next_letter() -> None:
    """On a line of its own from the second line on."""
    assert line_cue(Poem(WORD)) == "A for"
    assert line_cue(Poem(WORD, GOOD[:1])) == "\nB for"


def test_the_search_finds_a_poem_and_leaves_nothing_behind() -> None:
    """All of its complete poems keep every rule."""
    outcome = found(wins)
    assert outcome.is_solution
    assert outcome.poem == POEM
    assert outcome.num_poems >= 1


def test_the_first_line_gets_as_many_tries_as_all_later_ones_together() -> None:
    """Width times keep of them; later `width` for each beginning."""
    assert found(loses, width=3, keep=2).usage.nodes == 6 + 2 * 3


def test_a_search_that_fails_returns_the_longest_beginning() -> None:
    """What is not whole is no solution."""
    outcome = found(loses)
    assert not outcome.is_solution
    assert outcome.poem.lines == GOOD[:1]
    assert outcome.num_poems == 0


async def test_sampling_takes_at_least_the_tokens_it_is_given() -> None:
    """And stops soon after; nothing is left behind."""
    with scripted_engine(wins) as engine:
        samples = await sample(engine, WORD, num_tokens=1500, seed=1)
        assert engine.stats().blocks_used == 0
    assert 1500 <= samples.tokens_generated < 1600
    assert all(poem.is_complete for poem in samples.poems)


async def test_samples_are_judged_as_the_search_is() -> None:
    """Some poems of two coin flips are right, and the best one is one of those."""
    with scripted_engine(wins) as engine:
        samples = await sample(engine, WORD, num_tokens=1500, seed=1)
    assert 0 < samples.num_right < len(samples.poems)
    assert samples.best == POEM
    assert samples.num_right == samples.poems.count(POEM)


async def test_samples_count_what_requests_of_their_own_would_compute() -> None:
    """The whole prompt for each poem, where the engine computed it once."""
    with scripted_engine(wins) as engine:
        samples = await sample(engine, WORD, num_tokens=1, seed=1)
        root = engine.root(messages=prompt(WORD))
        num_prompt = root.num_tokens
    assert samples.tokens_logical > num_prompt * len(samples.poems)
    assert samples.tokens_computed < 2 * num_prompt
