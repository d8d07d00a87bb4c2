import pytest

import dendrite as dd
from dendrite.demo.growth import Growth, Round, Row
from dendrite.demo.task import Poem
from dendrite.dsl.events import EventKind
from dendrite.dsl.node import Node, Step
from dendrite.dsl.types import StepId


class Script:
    """Scripted events of a search: nodes by name, told to a growth as a search would tell them."""

    def __init__(self, word: str = "ABC") -> None:
        self.growth = Growth(word)
        self.ends: list[Round] = []
        self.nodes: dict[str, Node[Poem]] = {}
        root = Step(id=StepId(0), parent=None, index=0, state=Poem(word))
        self._steps = {"": root}
        self.tell("opened", Node(root))

    def tell(self, kind: EventKind, node: Node[Poem], *nodes: Node[Poem], detail: str = "") -> None:
        end = self.growth.saw(dd.Event(kind, node, nodes=nodes, detail=detail))
        if end is not None:
            self.ends.append(end)

    def tries(self, parent: str, *names: str) -> None:
        """Names that start with `!` break a rule, which follows a colon."""
        for name in names:
            above = self._steps[parent]
            text, _, reason = name.lstrip("!").partition(":")
            step = Step(id=StepId(len(self._steps)), parent=above, index=0, state=above.state, text=f" {text}")
            self._steps[text] = step
            node: Node[Poem] = Node(step)
            self.nodes[text] = node
            self.tell("expanded", node)
            if name.startswith("!"):
                self.tell("rejected", node, detail=reason)
            else:
                step.state = node.state.add(text)
                self.tell("observed", node)

    def keeps(self, *names: str) -> None:
        self.tell("round", self.nodes[names[0]], *(self.nodes[name] for name in names))

    def ends_with(self, name: str) -> None:
        self.tell("done", self.nodes[name])


@pytest.fixture
def script() -> Script:
    """Two rounds: a1 and a2 survive the first, b1 of a2 the second."""
    script = Script()
    script.tries("", "a1", "a2", "a3", "!x1:other letter", "!x2:other letter", "!x3:wrong length")
    script.keeps("a1", "a2")
    script.tries("a1", "!x4:other letter", "b2")
    script.tries("a2", "b1", "!x5:repeats a word")
    script.keeps("b1")
    return script


def drawn(rows: list[Row]) -> list[str]:
    return [
        f"{row.rails}{row.letter}{' ' if row.letter else ''}{row.text} <{row.kind}> {row.note}".strip() for row in rows
    ]


def test_a_tree_that_fits_is_shown_whole(script: Script) -> None:
    """Each line under the one it continues, with its letter, what became of it, and the rule it breaks."""
    assert drawn(script.growth.rows(limit=40)) == [
        "A a1 <let go>",
        "├─ B x4 <broken> other letter",
        "└─ B b2 <let go>",
        "A a2 <best>",
        "├─ B b1 <best>",
        "└─ B x5 <broken> repeats a word",
        "A a3 <let go>",
        "A x1 <broken> other letter",
        "A x2 <broken> other letter",
        "A x3 <broken> wrong length",
    ]


def test_broken_lines_are_folded_first(script: Script) -> None:
    """One row for all of a parent's, with how many broke which rule, most frequent first."""
    assert drawn(script.growth.rows(limit=9)) == [
        "A a1 <let go>",
        "├─ B b2 <let go>",
        "└─ 1 breaks a rule (1 other letter) <folded>",
        "A a2 <best>",
        "├─ B b1 <best>",
        "└─ 1 breaks a rule (1 repeats a word) <folded>",
        "A a3 <let go>",
        "3 break a rule (2 other letter, 1 wrong length) <folded>",
    ]


def test_then_what_was_let_go_is_folded_with_all_under_it(script: Script) -> None:
    """Only what may go on keeps a row."""
    assert drawn(script.growth.rows(limit=6)) == [
        "A a2 <best>",
        "├─ B b1 <best>",
        "└─ 1 breaks a rule (1 repeats a word) <folded>",
        "2 let go, 3 break a rule (2 other letter, 1 wrong length) <folded>",
    ]


def test_then_one_row_counts_all_others(script: Script) -> None:
    """No row stands for several but the last; rails lead to rows that are shown."""
    assert drawn(script.growth.rows(limit=3)) == ["A a2 <best>", "└─ B b1 <best>", "8 more lines tried <folded>"]


def test_the_best_path_alone_is_shown_when_even_that_is_too_much() -> None:
    """Other beginnings are counted, not shown."""
    script = Script()
    script.tries("", "a1", "a2", "a3")
    script.keeps("a2", "a1", "a3")
    assert drawn(script.growth.rows(limit=2)) == ["A a2 <best>", "2 more lines tried <folded>"]


@pytest.mark.parametrize("limit", range(1, 12))
def test_there_are_never_more_rows_than_asked_for(script: Script, limit: int) -> None:
    """However few that is."""
    assert len(script.growth.rows(limit)) <= limit


def test_a_round_is_counted(script: Script) -> None:
    """Tried, right, kept, and the line that the best beginning ends with."""
    assert script.ends == [
        Round(number=1, letter="A", num_tried=6, num_right=3, num_kept=2, best="a1"),
        Round(number=2, letter="B", num_tried=4, num_right=2, num_kept=1, best="b1"),
    ]


def test_the_end_counts_the_complete_poems(script: Script) -> None:
    """The last line has no round of its own: what is complete goes nowhere."""
    script.tries("b1", "c1", "c2", "!x6:other letter")
    script.ends_with("c2")
    assert script.ends[-1] == Round(number=3, letter="C", num_tried=3, num_right=2, num_kept=2, best="c2")
    kinds = {row.text: row.kind for row in script.growth.rows(limit=40)}
    assert (kinds["c1"], kinds["c2"], kinds["x6"]) == ("kept", "best", "broken")


def test_a_search_that_dies_ends_with_an_empty_round(script: Script) -> None:
    """Its best is the beginning that no line could continue, whose path is still shown as the best."""
    script.tries("b1", "!x6:other letter", "!x7:other letter")
    script.ends_with("b1")
    assert script.ends[-1] == Round(number=3, letter="C", num_tried=2, num_right=0, num_kept=0, best="")
    assert [row.text for row in script.growth.rows(limit=40) if row.kind == "best"] == ["a2", "b1"]


def test_nothing_is_shown_before_anything_happened() -> None:
    """The picture is drawn while the prompt is still being read."""
    assert Growth("AB").rows(limit=10) == []
