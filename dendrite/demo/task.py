"""What the demo asks for, and how code checks it: a poem whose first letters spell a word, line by line.

Every rule looks at one line and the lines before it, so a search can drop a path at its first bad line; a sample must
get all of them right in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dendrite.demo.examples import POEMS

MIN_WORDS, MAX_WORDS = 4, 8
RULES = (
    f"each line starts with its letter and has {MIN_WORDS} to {MAX_WORDS} words; no word of four letters or more "
    "comes twice, no two lines start alike, and no three words in a row are from the prompt's examples"
)

_PLAIN = re.compile(r"[A-Za-z ,;:.!?'’-]+")
_ONE_LETTER_WORDS = {"a", "i", "o"}
_LONGER = 4
"""Letters from which on a word counts as one that should not come twice."""
_COPIED = 3
"""Words in a row that make a copy."""


@dataclass(frozen=True)
class Poem:
    """The lines so far of a poem that is to spell `word`."""

    word: str
    lines: tuple[str, ...] = ()

    @property
    def letter(self) -> str:
        """What the next line starts with; there is one until the poem is complete."""
        return self.word[len(self.lines)]

    @property
    def is_complete(self) -> bool:
        """Whether it spells the whole word."""
        return len(self.lines) == len(self.word)

    def add(self, line: str) -> Poem:
        """The poem with one line more, unchecked."""
        return replace(self, lines=(*self.lines, line))


def fault(line: str, poem: Poem) -> str | None:
    """The first rule that `line` breaks as the next line of `poem`, in two or three words; None if it keeps all."""
    return next((name for name, breaks in _FAULTS.items() if breaks(line, poem)), None)


def faults(word: str, lines: Sequence[str]) -> list[str | None]:
    """What is wrong with each line of a whole poem, as `fault` says it."""
    poem = Poem(word)
    found: list[str | None] = []
    for line in lines:
        found.append(fault(line, poem))
        poem = poem.add(line)
    return found


def words(line: str) -> list[str]:
    """The words of a line in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", line.lower())


def _starts_otherwise(line: str, poem: Poem) -> bool:
    return not line.startswith(poem.letter)


def _has_odd_characters(line: str, _: Poem) -> bool:
    return not _PLAIN.fullmatch(line)


def _has_wrong_length(line: str, _: Poem) -> bool:
    return not MIN_WORDS <= len(words(line)) <= MAX_WORDS


def _starts_with_no_word(line: str, _: Poem) -> bool:
    """`B Is for bee` has the letter but not the word."""
    first = words(line)[0]
    return len(first) == 1 and first not in _ONE_LETTER_WORDS


def _repeats(line: str, poem: Poem) -> bool:
    own = [word for word in words(line) if len(word) >= _LONGER]
    before = {word for earlier in poem.lines for word in words(earlier)}
    same_start = words(line)[0] in {(*words(earlier), "")[0] for earlier in poem.lines}
    return same_start or len(set(own)) < len(own) or not before.isdisjoint(own)


def _copies(line: str, _: Poem) -> bool:
    return not _runs(line).isdisjoint(_EXAMPLE_RUNS)


def _runs(line: str) -> set[tuple[str, ...]]:
    own = words(line)
    return {tuple(own[start : start + _COPIED]) for start in range(len(own) - _COPIED + 1)}


_EXAMPLE_RUNS = {run for poem in POEMS.values() for line in poem.splitlines() for run in _runs(line)}

# In this order: the later ones rely on the earlier ones, such as on there being a word at all.
_FAULTS: dict[str, Callable[[str, Poem], bool]] = {
    "other letter": _starts_otherwise,
    "odd characters": _has_odd_characters,
    "wrong length": _has_wrong_length,
    "no first word": _starts_with_no_word,
    "repeats a word": _repeats,
    "copies an example": _copies,
}
