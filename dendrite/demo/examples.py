"""The poems that the prompt shows the model, ours: the first letters of their lines spell a word."""

from __future__ import annotations

from dendrite.engine.messages import Message

POEMS = {
    "MOON": """\
My window fills with silver light
Over the roofs a lantern is rising
Owls are calling from the barn
Nobody wants to go to bed""",
    "KITE": """\
Keep hold of the string, little brother
It pulls like a fish in a stream
The wind is laughing above us
Even the clouds have come to watch""",
    "RAIN": """\
Rivers are singing all day long
A frog puts on his shiny coat
Inside we drink our honey tea
Nothing is dry but the cat""",
    "BREAD": """\
Butter is waiting on the table
Rise slowly in the warm bowl
Every room smells of morning
All the children come running
Do not burn your tongue""",
    "STAR": """\
Someone has lit a candle up there
Ten thousand years it has travelled
Along the dark and empty road
Rest now upon my sleepy hand""",
    "HOUSE": """\
Here is the door that I know best
Old stairs creak under my feet
Upstairs a clock is counting the hours
Soup is steaming in the kitchen
Everyone I love is home""",
    "CLOUD": """\
Cotton ships sail over the hill
Look, one of those is a whale
Others are only mountains of snow
Under them all the fields turn grey
Drops begin to fall on my nose""",
    "LAKE": """\
Little waves are kissing the stones
A heron stands as still as a post
Kingfishers flash along the bank
Evening paints the water gold""",
    "GARDEN": """\
Green beans climb up to the sun
Ants are marching home with crumbs
Roses lean over the wall to listen
Dew is shining on every leaf
Early bees have begun their work
Night will find them fast asleep""",
    "FROST": """\
Fingers of ice have drawn on the glass
Roads are white as far as the hill
Our breath goes up like smoke
Sheep huddle close beside the gate
The sun is pale as a lemon""",
}


def tagged(line: str, letter: str) -> str:
    """A line as prompt and answer write it: `B for Butter is waiting on the table`."""
    return f"{cue(letter)} {line}"


def cue(letter: str) -> str:
    """What stands before a line."""
    return f"{letter} for"


def prompt(word: str) -> list[Message]:
    """The chat that asks for a poem on `word`; the examples are earlier turns of it."""
    turns: list[Message] = []
    for title, poem in POEMS.items():
        if title != word:
            lines = [tagged(line, letter) for line, letter in zip(poem.splitlines(), title, strict=True)]
            turns += [_question(title), {"role": "assistant", "content": "\n".join(lines)}]
    return [*turns, _question(word)]


def _question(word: str) -> Message:
    return {"role": "user", "content": f"Write a poem whose lines start with the letters of {word}."}
