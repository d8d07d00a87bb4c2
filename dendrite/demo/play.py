"""The demo from start to end: the search, then plain sampling with as many tokens, then both side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

import dendrite as dd
from dendrite.demo import report
from dendrite.demo.examples import prompt
from dendrite.demo.program import search
from dendrite.demo.sampling import sample
from dendrite.demo.task import RULES, Poem
from dendrite.demo.watchers import watcher
from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError

MAX_LETTERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user may choose."""

    word: str
    width: int
    keep: int
    seed: int

    @classmethod
    def of(cls, *, word: str, width: int, keep: int, seed: int) -> Settings:
        """Check the choices.

        Raises:
            RequestError: a word of other than 2 to 16 letters from A to Z.
        """
        if not (word.isascii() and word.isalpha() and 2 <= len(word) <= MAX_LETTERS):
            raise RequestError(f"--word {word!r}: give a word of 2 to {MAX_LETTERS} letters from A to Z")
        return cls(word=word.upper(), width=width, keep=keep, seed=seed)


async def play(engine: Engine, settings: Settings, console: Console, *, plain: bool) -> bool:
    """Run it all and print it; whether the search found a poem. Cancelling it prunes everything."""
    _introduce(console, engine, settings)
    found = await _searched(engine, settings, console, plain=plain)
    report.show_found(console, found)
    num_tokens = found.usage.tokens_generated
    console.print(f"\nSampling whole poems until they took {num_tokens:,} tokens too …", style="dim", highlight=False)
    samples = await sample(engine, settings.word, num_tokens=num_tokens, seed=settings.seed)
    report.show_samples(console, samples)
    report.show_costs(console, found, samples)
    return found.is_solution


def _introduce(console: Console, engine: Engine, settings: Settings) -> None:
    title = f"{engine.name} writes a poem that spells {settings.word}"
    console.print(f"{title}, by beam search over lines", style="bold", highlight=False, soft_wrap=True)
    console.print(f"Rules, checked by code: {RULES}.", highlight=False, soft_wrap=not console.is_terminal)
    tries = f"Each round: {settings.width} tries at the next line of each of the {settings.keep} best beginnings."
    console.print(f"{tries}\n", highlight=False)


async def _searched(engine: Engine, settings: Settings, console: Console, *, plain: bool) -> report.Found:
    program = search(settings.word, width=settings.width, keep=settings.keep)
    events = program.astream(engine, prompt(settings.word), state=Poem(settings.word), seed=settings.seed)
    result: dd.Result[Poem] | None = None
    with watcher(console, settings.word, plain=plain) as shown:
        async for event in events:
            shown.saw(event)
            result = event.result or result
    assert result is not None, "the last event of a search has its result"
    with result:
        return report.Found.of(result)
