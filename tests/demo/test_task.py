import pytest

from dendrite.demo.examples import POEMS, prompt
from dendrite.demo.task import MAX_WORDS, Poem, fault, faults, words

TREE = Poem("TREE")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("Trees are green in May", None),
        ("The wind", "wrong length"),
        ("The " + "x " * MAX_WORDS + "end", "wrong length"),
        ("Roots are deep in earth", "other letter"),
        ("trees are green in May", "other letter"),
        ("", "other letter"),
        ("Trees are green in 2024", "odd characters"),
        ("Träume are green in May", "odd characters"),
        ("T is for trees in May", "no first word"),
        ("T ... - ! ?", "wrong length"),
        ("Trees and other trees grow", "repeats a word"),
        ("Then Butter is waiting here", "copies an example"),
        ("Trees don't mind the rain, my friend!", None),
    ],
)
def test_fault_names_the_first_rule_that_a_line_breaks(line: str, reason: str | None) -> None:
    """Each rule by itself, on a first line."""
    assert fault(line, TREE) == reason


@pytest.mark.parametrize(
    "line, reason",
    [
        ("Rivers run to the sea", None),
        ("Rain falls on trees now", "repeats a word"),
        ("Rain falls on TREES now", "repeats a word"),
        ("Rain is in my garden", None),
        ("Trees are green in May", "other letter"),
    ],
)
def test_fault_reads_the_lines_before(line: str, reason: str | None) -> None:
    """The letter is that of the next line; longer words come once, short ones as often as they like."""
    assert fault(line, TREE.add("Trees are green in May")) == reason


def test_two_lines_do_not_start_alike() -> None:
    """Not even with a short word, which may come twice elsewhere."""
    poem = Poem("AA").add("An owl is in it")
    assert fault("An elk is on it", poem) == "repeats a word"
    assert fault("As an elk is on it", poem) is None


def test_a_line_without_words_before_hinders_nothing() -> None:
    """Samples may have empty lines; what follows is still judged."""
    assert faults("AB", ["", "Birds fly over the lake"]) == ["other letter", None]


def test_a_poem_knows_its_next_letter_and_its_end() -> None:
    """Adding a line makes another poem; the first is as it was."""
    poem = Poem("AB")
    longer = poem.add("Ants go up the hill")
    assert (poem.letter, longer.letter, poem.is_complete) == ("A", "B", False)
    assert longer.add("Birds sing in the sun").is_complete
    assert poem.lines == ()


def test_words_are_lower_case_and_whole() -> None:
    """Apostrophes belong to a word, other punctuation does not."""
    assert words("Don't, o'er -  the HILL!") == ["don't", "o'er", "the", "hill"]


@pytest.mark.parametrize("title", POEMS)
def test_the_examples_keep_the_rules_they_teach(title: str) -> None:
    """All but the one about copies, which is about them."""
    found = faults(title, POEMS[title].splitlines())
    assert set(found) == {"copies an example"}


def test_the_prompt_shows_the_examples_and_ends_with_the_question() -> None:
    """User and assistant take turns; each line stands after its cue."""
    turns = prompt("FORK")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(POEMS) + ["user"]
    assert "FORK" in turns[-1]["content"]
    assert turns[1]["content"].startswith("M for My window")


def test_the_prompt_does_not_show_a_poem_on_the_word_itself() -> None:
    """A word that an example has is asked for without that example."""
    assert len(prompt("MOON")) == len(prompt("FORK")) - 2
