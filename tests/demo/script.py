"""A small world for the demo's tests: a scripted model that writes poems on AB, some lines good and some bad."""

from dendrite.demo.task import Poem
from dendrite.testing import Reply

WORD = "AB"
GOOD = ("Ants go up the hill", "Birds sing in the sun")
BAD = "No luck"
POEM = Poem(WORD, GOOD)


def wins(text: str) -> Reply:
    """Every other line is good."""
    return [f" {_good(text)}\n", f" {BAD}\n"]


def loses(text: str) -> Reply:
    """First lines are good, second ones never."""
    return f" {_good(text) if text.endswith('A for') else BAD}\n"


def _good(text: str) -> str:
    return GOOD[1] if text.endswith("B for") else GOOD[0]
