"""Constraints on the default model: its own tokenizer, its own words, and the programs that users will write."""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

import dendrite as dd

ASK = [dd.Message(role="user", content="Invent a person and answer in JSON.")]


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


@pytest.fixture(scope="module")
def engine(real_model_folder: Path) -> Iterator[dd.Engine]:
    """The real model, which must hold nothing at the end."""
    with dd.Engine.load(str(real_model_folder), dtype="float32", kv_memory="256MiB") as made:
        yield made
        made.check_integrity()
        assert made.stats().blocks_used == 0


def test_json_of_the_real_model_fits_its_model(engine: dd.Engine) -> None:
    """Valid, with forced keys, in tokens that the tokenizer itself would write for a greedy text."""
    with engine.root(messages=ASK, seed=1) as root:
        outs = engine.generate(root.fork(6), constraint=dd.Constraint(schema=Person), max_tokens=64, temperature=0.8)
        done = [out for out in outs if out.finish_reason == "stop"]
        assert len(done) >= 3
        for out in done:
            assert set(Person.model_validate_json(out.text).model_dump()) == {"name", "age", "mood"}
            assert out.num_forced >= 8
            assert engine.tokenizer.decode(out.token_ids) == out.text


def test_forced_tokens_are_the_tokenizers_own(engine: dd.Engine) -> None:
    """A text without alternatives comes in canonical tokens."""
    value = {"first name": "Ada", "numbers": [1, 23, 456], "note": "naïve – 日本"}
    with engine.root("JSON:") as root:
        out = root.generate(constraint=dd.Constraint(schema={"const": value}))
        assert json.loads(out.text) == value
        assert list(out.token_ids) == engine.tokenizer.encode(out.text)
        assert out.num_forced == len(out.token_ids)


def test_fast_forward_gives_the_tokens_of_slow_drawing(engine: dd.Engine) -> None:
    """Greedy, once with forced runs in one step and once token by token."""
    constraint = dd.Constraint(schema=Person)
    texts = []
    for fast_forward in (True, False):
        with engine.root(messages=ASK) as root:
            out = root.generate(constraint=constraint, max_tokens=64, fast_forward=fast_forward)
            texts.append((out.text, out.token_ids))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("regex", [r"(Paris|Rome)\.", r"\d{2}:\d\d", r"[«“][\p{L} ]{3,12}[»”]", "日+本"])
def test_expressions_on_the_real_vocabulary(engine: dd.Engine, regex: str) -> None:
    """Digits, quotes and characters of several tokens."""
    pattern = regex.replace(r"\p{L}", r"[^\W\d_]").replace(r"[[^\W\d_] ]", r"(?:[^\W\d_]| )")
    with engine.root("The answer is", seed=2) as root:
        for out in engine.generate(root.fork(4), constraint=dd.Constraint(regex=regex), max_tokens=24, temperature=1.0):
            assert out.finish_reason == "length" or re.fullmatch(pattern, out.text), out.text


# --- as in the programs that the surface was designed for ----------------------------------------------------------


@dataclass(frozen=True)
class Game:
    left: tuple[int, ...]


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def legal(game: Game) -> list[str]:
    pairs = itertools.permutations(game.left, 2)
    return list(dict.fromkeys(f" {a} {sign} {b}" for a, b in pairs for sign in OPERATIONS if sign == "-" or a >= b))


def play(game: Game, move: str) -> Game:
    first, sign, second = move.split()
    left = list(game.left)
    left.remove(int(first))
    left.remove(int(second))
    return Game((*left, OPERATIONS[sign](int(first), int(second))))


@dd.expand(width=4)
def move(node: dd.Node[Game]) -> dd.Gen:
    return dd.Gen(f"\nLeft: {node.state.left}. Step:", choices=legal(node.state))


@dd.observe
def apply(node: dd.Node[Game]) -> dd.Outcome[Game]:
    now = play(node.state, node.text)
    return dd.Outcome(now, goal=now.left == (24,), terminal=len(now.left) == 1)


@dd.score
def near(node: dd.Node[Game]) -> float:
    return -abs(sum(node.state.left) - 24)


def test_a_search_over_legal_moves_runs_on_the_real_model(engine: dd.Engine) -> None:
    """Every step is a legal move of its own position, so no observation can fail."""
    program = dd.compile(move, apply, near, dd.prune(keep=3), strategy=dd.Beam(depth=3))
    with program.run(engine, "Use 4 6 1 to make 24.", state=Game((4, 6, 1)), seed=1) as result:
        steps = [node for node in result.tree if node.parent is not None]
        assert steps
        assert all(node.text in legal(node.parent.state) for node in steps if node.parent is not None)
        assert result.usage.tokens_generated > 0


ACT = 'start: " finish" | " look(" NAME ")"\nNAME: /[a-z]{1,8}/'


@dd.expand(width=3, stop="\n")
def act(node: dd.Node) -> dd.Gen:
    return dd.Gen("\nAct:", grammar=ACT)


def test_tool_calls_under_a_grammar_parse(engine: dd.Engine) -> None:
    """The tool never sees anything but a call that it knows."""
    seen: list[str] = []

    @dd.observe
    def use_tool(node: dd.Node) -> dd.Outcome[object]:
        seen.append(node.text)
        return dd.Outcome(None, append="\nObservation: nothing", terminal=node.text == " finish")

    program = dd.compile(act, use_tool, dd.score(lambda node: 1.0), dd.prune(keep=2), strategy=dd.Beam(depth=2))
    with program.run(engine, "Look around the house.", seed=4):
        assert seen
        assert all(re.fullmatch(r" finish| look\([a-z]{1,8}\)", text) for text in seen)
