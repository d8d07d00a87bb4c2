"""What the demo prints at its end: the poem found, the best sample, and what both took."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

import dendrite as dd
from dendrite.demo.sampling import Samples
from dendrite.demo.task import Poem, faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search ended with."""

    poem: Poem
    """The best one, or the longest beginning if none is complete."""
    num_poems: int
    """Complete ones, all of which keep the rules."""
    usage: dd.Usage

    @classmethod
    def of(cls, result: dd.Result[Poem]) -> Found:
        """Read a result, which may be closed afterwards."""
        poem = max((node.state for node in result.best.path), key=lambda state: len(state.lines))
        complete = [node for node in result.tree if node.status == "terminal" and node.state.is_complete]
        return cls(poem=poem, num_poems=len(complete), usage=result.usage)

    @property
    def is_solution(self) -> bool:
        """Whether the whole word is spelt and every line, checked once more, keeps the rules."""
        return self.poem.is_complete and not any(faults(self.poem.word, self.poem.lines))


def show_found(console: Console, found: Found) -> None:
    """The poem, with a verdict on each line."""
    num_lines = len(found.poem.word)
    missing = num_lines - len(found.poem.lines)
    title = "The search found a poem that keeps every rule:" if found.is_solution else "The search found no whole poem:"
    console.print(f"\n{title}\n", style="bold green" if found.is_solution else "bold red", highlight=False)
    show_poem(console, found.poem)
    if missing:
        verb = "is" if missing == 1 else "are"
        hint = "try another --seed, or more tries with --width"
        _say(console, f"\n{missing} of {num_lines} lines {verb} missing: {hint}")


def show_samples(console: Console, samples: Samples) -> None:
    """How many samples keep the rules, and the best of them."""
    count = f"{samples.num_right} of {len(samples.poems)}"
    title = f"Plain sampling of whole poems, with at least as many tokens: {count} keep every rule. The best of them:"
    console.print(f"\n{title}\n", style="bold", highlight=False, soft_wrap=True)
    show_poem(console, samples.best)


def show_poem(console: Console, poem: Poem) -> None:
    """One line of the poem a row: its letter, the line, and `ok` or the rule it breaks."""
    table = Table.grid(padding=(0, 2))
    for letter, line, fault in zip(poem.word, poem.lines, faults(poem.word, poem.lines), strict=False):
        verdict = Text(fault, style="red") if fault else Text("ok", style="green")
        table.add_row("", Text(letter, style="bold"), Text(line), verdict)
    console.print(table)


def show_costs(console: Console, found: Found, samples: Samples) -> None:
    """Both side by side: what they found and what they took."""
    usage = found.usage
    table = Table("", "search", "sampling", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, mine, theirs in (
        ("poems that keep every rule", f"{found.num_poems:,}", f"{samples.num_right:,}"),
        ("tokens sampled", f"{usage.tokens_generated:,}", f"{samples.tokens_generated:,}"),
        ("tokens computed", f"{usage.tokens_computed:,}", f"{samples.tokens_computed:,}"),
        ("  as separate requests", f"{usage.tokens_logical:,}", f"{samples.tokens_logical:,}"),
        ("seconds", f"{usage.seconds:.1f}", f"{samples.seconds:.1f}"),
    ):
        table.add_row(name, mine, theirs)
    console.print()
    console.print(table)
    saved = usage.tokens_logical / max(1, usage.tokens_computed)
    shared = f"its {usage.nodes:,} lines share the prompt and their beginnings"
    held = f"It held {usage.peak_kv_bytes / 1e6:.0f} MB of K/V at most."
    _say(console, f"\nThe search computed {saved:.0f} times fewer tokens than separate requests: {shared}. {held}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)
