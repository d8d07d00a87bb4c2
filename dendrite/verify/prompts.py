"""The prompts of a verification: short and long, chat and plain, every kind of text that tokenizers trip over."""

from __future__ import annotations

from dataclasses import dataclass

from dendrite.engine.messages import Message
from dendrite.engine.text import Tokenizer

TEXTS = {
    "plain": "The river rose in the night, and in the morning the bridge",
    "whitespace": " \n\n \t \n  ",
    "digits": "3.14159 26535 89793, 1,000,000 and 0x7F; 2026-02-30 12:59:07 +00",
    "code": "def merge(left: list[int], right: list[int]) -> list[int]:\n    merged = []\n    while left and",
    "markup": '<table id="t">\n\t<tr><td>1 &amp; 2</td></tr>\n</table>\n```json\n{"a": [null, true, -1e-9]}\n```',
    "accents": "Größe, naïve, señor, Dvořák, İstanbul, cafe\u0301: six words, and now",
    "scripts": "Ελλάδα, Россия, 中文, 日本語, العربية, עברית, हिन्दी, ภาษาไทย",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd means",
    "repeats": "no no no no no no no no no no no no no no no no no",
    "special": "A literal <|endoftext|> in a text, and <s>",
}
SYSTEM: Message = {"role": "system", "content": "You answer in one short sentence."}
CHATS: dict[str, list[Message]] = {
    "chat": [{"role": "user", "content": "Name three rivers of Europe."}],
    "long chat": [
        SYSTEM,
        {"role": "user", "content": "What is 17 times 3?"},
        {"role": "assistant", "content": "17 times 3 is 51."},
        {"role": "user", "content": "And if I add 9 to it? ¿Cuánto es?"},
    ],
}
LENGTHS = (1, 16, 129, 513, 1500)
"""Of the prompts cut to a length, in tokens: one, a whole block, around powers of two, many chunks."""

THINGS = ("lamp", "rope", "map", "kettle", "anchor", "ladder", "drum", "net", "wheel", "bell", "brush")
PLACES = ("in the attic", "under the stairs", "by the door", "on the third shelf", "behind the boiler")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A named prompt, as token ids."""

    name: str
    token_ids: tuple[int, ...]


def make_prompts(tokenizer: Tokenizer, *, room: int, has_template: bool) -> list[Prompt]:
    """All prompts, shortest kinds first.

    Args:
        tokenizer: the model's.
        room: the most tokens a prompt may have; longer ones are cut.
        has_template: whether the model has a chat template; without it there are no chats.
    """
    texts = [Prompt(name, tuple(tokenizer.encode(text, bos=True)[:room])) for name, text in TEXTS.items()]
    chats = [Prompt(name, tuple(tokenizer.render(turns)[:room])) for name, turns in CHATS.items() if has_template]
    story = tokenizer.encode(inventory(400), bos=True)
    lengths = dict.fromkeys(min(length, room, len(story)) for length in LENGTHS)
    return [*texts, *chats, *(Prompt(_length_name(length), tuple(story[:length])) for length in lengths)]


def inventory(num_lines: int) -> str:
    """A long text that does not repeat itself word for word."""
    lines = (
        f"{line}. The {THINGS[line * 7 % len(THINGS)]} {PLACES[line * 3 % len(PLACES)]} was counted {line * line % 97} "
        f"times."
        for line in range(1, num_lines + 1)
    )
    return "An inventory.\n" + "\n".join(lines)


def _length_name(length: int) -> str:
    return f"{length:,} token{'s' if length > 1 else ''}"
